"""Disk space: checked before large writes, and turned into a clear error when it runs out or the
disk cannot be written.

A full disk shows as an OSError with or without a file's name, as safetensors' own error, as
torch.save's "unexpected pos" in another rank's traceback, or as a compiler's last line.
`disk_failure` recognizes them all and reports the same: which file, what it needs, what is free,
what to do.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.run.errors import InputError, StageFailure, exception_chain
from stages.run.progress import show_size

REMEDY = "Make room, or make outputs/ a link to a folder on a larger disk."

# What libraries and compilers print instead of an error number. torch.save has its own words for
# a short write.
_PHRASES = {
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
    """`folder`, or its nearest parent that exists: where it would be created."""
    # os.path.exists: a path that may not even be looked at counts as missing, and its parent then
    # as not writable.
    return next(
        path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path)
    )


def write_problem(folder: Path) -> str | None:
    """Why `folder` cannot be written or created, with the remedy but without the full stop; None
    where it can."""
    place = nearest_existing(folder)
    if not place.is_dir():
        return f"{place} is a file. Remove it"
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        return f"{place} is on a disk that is mounted read-only. Mount it for writing"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} cannot be written by user {os.getuid()}. Change its owner or its mode"
    return None


def free_space(folder: Path) -> int:
    """Bytes free on the disk of `folder`, or of its nearest parent that exists."""
    return shutil.disk_usage(nearest_existing(folder)).free


def write_speed(folder: Path) -> float:
    """Bytes per second that reach the disk of `folder`, measured with up to 64 MB in about a
    second.

    The file has no name, so nothing is left of it. Raises OSError where it cannot be written.
    """
    block = os.urandom(16 * 10**6)  # random, for a disk that compresses
    written, started = 0, time.monotonic()
    with tempfile.TemporaryFile(dir=nearest_existing(folder), buffering=0) as file:
        while written < 4 * len(block) and time.monotonic() - started < 1:
            written += file.write(block)
            os.fsync(file.fileno())
    return written / (time.monotonic() - started)


def require_writable(folder: Path) -> None:
    """Raise StageFailure where `folder` cannot be written or created."""
    if problem := write_problem(folder):
        raise StageFailure(f"{problem}, or make outputs/ a link to another folder.")


def require_space(what: str, folder: Path, needed: int) -> None:
    """Raise StageFailure unless `needed` bytes for `what` fit on the disk of `folder`."""
    free = free_space(folder)
    if needed > free:
        raise StageFailure(
            f"{folder} has room for {show_size(free)}, and {show_size(needed)} are needed for "
            f"{what}. {REMEDY}"
        )


@contextmanager
def disk_guard(what: str, folder: Path, needed: int = 0) -> Iterator[None]:
    """Require `needed` bytes; raise `disk_failure`'s error for what a full disk raises inside."""
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
    """The failure to report for an error that a full, closed or read-only disk caused; else None.

    `folder` is where was written to, `needs` how much, where known. Call it before anything half
    written is removed: the message names the file and the space left.
    """
    if isinstance(error, (InputError, StageFailure)):
        return None
    for part in exception_chain(error):
        number = _number(part)
        if number is None:
            continue
        name = getattr(part, "filename", None)
        if number in (errno.EACCES, errno.EPERM):
            about = (
                f"{name or folder}: user {os.getuid()} may not read or write it. "
                "Change its owner or its mode."
            )
        elif number == errno.EROFS:
            about = (
                f"{name or folder} is on a disk that is mounted read-only. "
                "Mount it for writing, or make outputs/ a link to another."
            )
        else:
            space = f"{_free(folder)}{needs and f', and {needs}'}"
            about = f"{name or _last_written(folder)}: the disk is full. {space}. {REMEDY}"
        return StageFailure(f"{about} Nothing was published; the former output is whole.")
    return None


def _number(error: BaseException) -> int | None:
    """The error number where a disk refused; None for every other error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _NUMBERS else None
    text = str(error)
    return next(
        (number for number, words in _PHRASES.items() if any(word in text for word in words)), None
    )


def _last_written(folder: Path) -> str:
    """The last file written below `folder`: the one cut off, where the error does not name it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return (
        f"{max(files, key=lambda path: path.stat().st_mtime_ns)}, or what comes after it"
        if files
        else str(folder)
    )


def _free(folder: Path) -> str:
    """The space left on the disk of `folder`, and on that of temporary files where it is less."""
    temporary, free = Path(os.environ.get("TMPDIR") or "/tmp"), free_space(folder)
    fuller = free_space(temporary) < free
    return f"{folder} has {show_size(free)} left" + (
        f", {temporary} (TMPDIR) {show_size(free_space(temporary))}" if fuller else ""
    )
