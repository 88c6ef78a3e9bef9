"""One stage at a time per run folder, by flock on a file inside it; and folders that stages share.

The kernel releases the lock when its holder dies, however it dies, and a container that mounts the
folder sees it. A file with a process id would do neither. (The filelock package truncates its file
on every attempt, which would erase who holds it.)
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.run.errors import InputError
from stages.run.fsync import make_durable_folder
from stages.run.guard import kill_marked, mark


@contextmanager
def locked(run_folder: Path, stage: str) -> Iterator[None]:
    """Hold the run folder for `stage`; where another stage holds it, say which and wait.

    The file names the holder and is emptied on release. If it still names one when we get the lock,
    that holder was killed: what it started is killed first, because it may still write.
    """
    make_durable_folder(run_folder)
    with open(run_folder / ".lock", "a+", encoding="utf-8", opener=_no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"{stage}: waiting for {_described(_holder(run_folder))} in {run_folder}",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        killed = _holder(run_folder).get("mark")
        kill_marked(killed if killed != mark() else None)
        file.truncate(0)
        holder = {
            "stage": stage,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%H:%M:%S"),
            "mark": mark(),
        }
        json.dump(holder, file)
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextmanager
def shared(file: Path, alone: Callable[[], None]) -> Iterator[None]:
    """Hold `file`'s folder together with other stages; `alone` runs first if no other holds it.

    Raises OSError where the file cannot be opened or the file system has no locks.
    """
    make_durable_folder(file.parent)
    with open(file, encoding="utf-8", opener=_made_or_read) as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            alone()
        fcntl.flock(opened, fcntl.LOCK_SH)  # waits only while another stage's `alone` runs
        yield


def _made_or_read(path: str, flags: int) -> int:
    """For `open`: make the file; another user's, which may not be written, can be held too."""
    try:
        return _no_link(path, os.O_RDWR | os.O_CREAT)  # NFS locks only what may be written
    except PermissionError:
        return _no_link(path, flags)


def _no_link(path: str, flags: int) -> int:
    """For `open`: the file is emptied, so it must not be a link that another user planted."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"{path} is a link, and a lock must be a plain file. Remove it.") from None


def _holder(run_folder: Path) -> dict[str, Any]:
    """What the lock file says of its holder; empty where it says nothing."""
    try:
        holder = json.loads((run_folder / ".lock").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _described(holder: dict[str, Any]) -> str:
    try:
        place = f"process {holder['pid']} on {holder['host']}"
        return f"{holder['stage']} ({place}, since {holder['since']})"
    except KeyError:
        return "another make"
