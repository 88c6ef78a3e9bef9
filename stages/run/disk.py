"""Room on the disk: asked for before much is written, and told of where it ran out all the same, or where nothing may be written.

A full disk has many voices: an OSError with or without a file's name, safetensors' own error, torch.save's "unexpected pos" in
the traceback of another rank, the last line of a compiler. `disk_failure` knows them, and says of each the same: which file,
what it takes, what is free, what to do.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.run.errors import InputError, StageFailure, exception_chain
from stages.run.progress import show_size

REMEDY = "Make room, or make outputs/ a link to a folder on a larger disk."

# What libraries and compilers say in the place of an error number. torch.save has only its own words for a write that came up short.
_SAID = {
    errno.ENOSPC: (
        "No space left on device",
        "unexpected pos",
        "PytorchStreamWriter failed writing",
    ),
    errno.EDQUOT: ("Disk quota exceeded",),
    errno.EROFS: ("Read-only file system",),
}
_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def nearest_existing(folder: Path) -> Path:
    """`folder`, or the nearest above it that is there: where it would be made."""
    # os.path: what may not even be looked at counts as not there, and the folder above it as what cannot be written.
    return next(
        path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path)
    )


def write_problem(folder: Path) -> str | None:
    """Why nothing can be written to `folder`, or it cannot be made; with what to do but for the full stop. None where it can."""
    place = nearest_existing(folder)
    if not place.is_dir():
        return f"{place} is a file. Remove it"
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        return f"{place} is on a disk that is mounted read-only. Mount it for writing"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} cannot be written by user {os.getuid()}. Change its owner or its mode"
    return None


def free_space(folder: Path) -> int:
    """Bytes that can still be written to the disk of `folder`, or of the nearest folder above it that is there."""
    return shutil.disk_usage(nearest_existing(folder)).free


def require_writable(folder: Path) -> None:
    """Raise StageFailure where nothing can be written to `folder`, or it cannot be made."""
    if problem := write_problem(folder):
        raise StageFailure(f"{problem}, or make outputs/ a link to another folder.")


def require_space(what: str, folder: Path, needed: int) -> None:
    """Raise StageFailure unless `needed` bytes, which `what` takes, fit on the disk of `folder`."""
    free = free_space(folder)
    if needed > free:
        raise StageFailure(
            f"{folder} has room for {show_size(free)}, and {show_size(needed)} are needed for {what}. {REMEDY}"
        )


@contextmanager
def disk_guard(what: str, folder: Path, needed: int = 0) -> Iterator[None]:
    """`require_space`, where it is known how much is `needed`; within it, a full or closed disk's error is raised as `disk_failure`'s."""
    require_space(what, folder, needed)
    try:
        yield
    except Exception as error:
        if failure := disk_failure(
            error, folder, f"{show_size(needed)} are needed for {what}" if needed else ""
        ):
            raise failure from error
        raise


def disk_failure(error: BaseException, folder: Path, needs: str = "") -> StageFailure | None:
    """What to tell of an error that came of a disk which is full or may not be written or read; None for any other.

    `folder` is where it was written to, `needs` says how much of it, where that is known. To be asked before what was half written
    is removed: it tells of it, and of the room that is left.
    """
    if isinstance(error, (InputError, StageFailure)):  # said already
        return None
    for part in exception_chain(error):
        number = _number(part)
        if number is None:
            continue
        name = getattr(part, "filename", None)
        if number in (errno.EACCES, errno.EPERM):
            about = f"{name or folder}: user {os.getuid()} may not read or write it. Change its owner or its mode."
        elif number == errno.EROFS:
            about = f"{name or folder} is on a disk that is mounted read-only. Mount it for writing, or make outputs/ a link to another."
        else:
            about = f"{name or _last_written(folder)}: the disk is full. {_free(folder)}{needs and f', and {needs}'}. {REMEDY}"
        return StageFailure(f"{about} Nothing was published; the former output is whole.")
    return None


def _number(error: BaseException) -> int | None:
    """The error number of a disk's refusal; None for every other error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _NUMBERS else None
    text = str(error)
    return next(
        (number for number, words in _SAID.items() if any(word in text for word in words)), None
    )


def _last_written(folder: Path) -> str:
    """The file below `folder` that was written last: the one that was cut off, where the error does not name it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return (
        f"{max(files, key=lambda path: path.stat().st_mtime_ns)}, or what comes after it"
        if files
        else str(folder)
    )


def _free(folder: Path) -> str:
    """What is left on the disk of `folder`, and on that of temporary files, which compilers write to."""
    temporary, free = Path(os.environ.get("TMPDIR") or "/tmp"), free_space(folder)
    fuller = free_space(temporary) < free
    return f"{folder} has {show_size(free)} left" + (
        f", {temporary} (TMPDIR) {show_size(free_space(temporary))}" if fuller else ""
    )
