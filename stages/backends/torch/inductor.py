"""Where inductor, torch's compiler, keeps its files, and how it works in a path with a space.

It calls the C++ compiler without quoting paths, so neither torch nor inductor's cache may be in a
folder whose path has a space.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stages.backends.device import INDUCTOR_CACHE


def unusable_path() -> str | None:
    """The path that keeps inductor from working with its cache in the project, if there is one."""
    return next(
        (path for path in (torch.__file__, str(INDUCTOR_CACHE.absolute())) if " " in path), None
    )


@contextmanager
def scratch_space(folder: Path) -> Iterator[None]:
    """Inside this context, spawned processes compile in a temporary folder inside `folder`.

    The temporary folder is in the system's one if the path of `folder` has a space. If torch's path
    has a space, spawned processes import torch through a link in the temporary folder.
    """
    usable = " " not in str(folder.absolute())
    with tempfile.TemporaryDirectory(
        prefix="inductor-", dir=folder.absolute() if usable else None
    ) as scratch:
        link = Path(scratch) / "site-packages"
        link.symlink_to(Path(torch.__file__).parents[1])
        environment = dict(os.environ)
        # Set even where it is set already: torch itself writes its default, a folder in /tmp, into
        # the environment of this process.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/cache"
        sys.path[:0] = [str(link)] if " " in torch.__file__ else []
        try:
            yield
        finally:
            if str(link) in sys.path:
                sys.path.remove(str(link))
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            os.environ.update(environment)
