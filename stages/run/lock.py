"""One stage at a time per run folder, by flock on a file inside it.

The kernel drops the lock when its holder dies, however it dies, and the lock is seen from a container that mounts the
folder; a process id in a file would be neither.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(run_folder: Path, stage: str) -> Iterator[None]:
    """Hold the run folder for `stage`; where another holds it, say who and wait for it."""
    run_folder.mkdir(parents=True, exist_ok=True)
    with open(run_folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{stage}: waiting for {_holder(run_folder)} in {run_folder}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        json.dump({"stage": stage, "pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%H:%M:%S")}, file)
        file.flush()
        yield


def _holder(run_folder: Path) -> str:
    try:
        facts = json.loads((run_folder / ".lock").read_text(encoding="utf-8"))
        return f"{facts['stage']} (process {facts['pid']} on {facts['host']}, since {facts['since']})"
    except (OSError, ValueError, KeyError):
        return "another make"
