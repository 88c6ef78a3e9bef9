"""Where inductor, torch's compiler, keeps its files, how it works in a path with a space, and what
its C++ compiler knows.

It calls the C++ compiler without quoting paths, so neither torch nor inductor's cache may be in a
folder whose path has a space.
"""

from __future__ import annotations

import os
import subprocess
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


def compiler_knows_instructions() -> bool | None:
    """True if the C++ compiler has the flags of every vector instruction set of this CPU.

    Inductor would compile and load a test of each of them, which takes seconds. None tells it to.
    """
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.cpu_vec_isa import supported_vec_isa_list, x86_isa_checker

        here = set(x86_isa_checker())
        sets = [isa for isa in supported_vec_isa_list if here.issuperset(str(isa).split())]
        flags = [flag for isa in sets for flag in isa.build_arch_flags().split()]
        command = [get_cpp_compiler(), *flags, "-fsyntax-only", "-x", "c++", os.devnull]
        ended = subprocess.run(command, capture_output=True, check=False)
    except (ImportError, AttributeError):  # private, so a later torch may move or change them
        return None
    return True if sets and ended.returncode == 0 else None


@contextmanager
def scratch_space(folder: Path) -> Iterator[None]:
    """Inside this context, new Python processes compile in a temporary folder inside `folder`.

    The temporary folder is in the system's one if the path of `folder` has a space. If torch's path
    has a space, new processes import torch through a link in the temporary folder.
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
        changed = {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/cache"}
        if " " in torch.__file__:
            paths = [str(link), environment.get("PYTHONPATH", "")]
            changed["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        os.environ.update(changed)
        try:
            yield
        finally:
            for name in changed:
                os.environ.pop(name)
            os.environ.update(environment)
