"""Where inductor, torch's compiler, keeps its files, and how it copes with a path that has a space.

It calls the C++ compiler without quoting paths, so neither torch nor its cache may lie below a folder with a space.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# The kernels of a training that is compiled: filled by precompile, read by train, shared by all runs.
COMPILE_CACHE = Path("outputs/.cache/inductor")


def unusable_path() -> str | None:
    """The path that keeps inductor from working with its cache in the project, if any."""
    return next(
        (path for path in (torch.__file__, str(COMPILE_CACHE.absolute())) if " " in path), None
    )


@contextmanager
def scratch_space(beside: Path) -> Iterator[None]:
    """Within it, processes that multiprocessing spawns compile in a folder that goes when it ends.

    The folder is in `beside`, or the system's temporary one where that path has a space; torch is then found through a
    link in it.
    """
    usable = " " not in str(beside.absolute())
    with tempfile.TemporaryDirectory(
        prefix="inductor-", dir=beside.absolute() if usable else None
    ) as folder:
        link = Path(folder) / "site-packages"
        link.symlink_to(Path(torch.__file__).parents[1])
        before = dict(os.environ)
        # Set whatever it is: torch itself writes its default, a folder in /tmp, into this process's environment.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"
        sys.path[:0] = [str(link)] if " " in torch.__file__ else []
        try:
            yield
        finally:
            if str(link) in sys.path:
                sys.path.remove(str(link))
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            os.environ.update(before)
