"""One stage at a time per run folder, by flock on a file inside it.

The kernel drops the lock when its holder dies, however it dies, and the lock is seen from a container that mounts the
folder; a process id in a file would be neither.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.run.errors import InputError
from stages.run.fsync import make_durable_folder
from stages.run.guard import kill_marked, mark


@contextmanager
def locked(run_folder: Path, stage: str) -> Iterator[None]:
    """Hold the run folder for `stage`; where another holds it, say who and wait for it.

    The file tells of the holder until it lets go. What tells of one that has gone without was left by a kill, and
    whatever that holder had started is ended first: it may still write.
    """
    make_durable_folder(run_folder)
    with open(run_folder / ".lock", "a+", encoding="utf-8", opener=_no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"{stage}: waiting for {_described(_facts(run_folder))} in {run_folder}",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        left = _facts(run_folder).get("mark")
        kill_marked(left if left != mark() else None)
        file.truncate(0)
        facts = {
            "stage": stage,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%H:%M:%S"),
            "mark": mark(),
        }
        json.dump(facts, file)
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _no_link(path: str, flags: int) -> int:
    """For `open`: the file is emptied, so where others can write the folder it may not be a link to one of the caller's."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(
            f"{path} is a link; a run's lock is a file of its own. Remove it."
        ) from None


def _facts(run_folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((run_folder / ".lock").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _described(facts: dict[str, Any]) -> str:
    try:
        return (
            f"{facts['stage']} (process {facts['pid']} on {facts['host']}, since {facts['since']})"
        )
    except KeyError:
        return "another make"
