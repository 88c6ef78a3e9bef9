"""Nothing that a stage starts outlives it, and the stage does not outlive its make, however they end.

A stage first starts a guard: a process in a session of its own that waits until the stage has ended, by whatever signal,
and then kills what is left of its descendants: launchers, ranks, compilers and the compilers' own children, whatever
sessions they have moved to. They are known by a mark in the environment, which each hands on to those that it starts.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h; prctl(2)
_MARK = "TRN_TUNE_STAGE"
_MAKE = "TRN_TUNE_MAKE"


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent is gone, or end it now if it is no longer `parent` (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def guard_stage() -> None:
    """Tie this stage to its make, whose process id the Makefile passes, and to the stage all that it will start.

    To be called before there are threads. Children that are forked without a new program are not covered.
    """
    make = os.environ.pop(_MAKE, None)
    die_with_parent(int(make) if make else None)
    os.environ[_MARK] = own = os.urandom(8).hex()
    ended, alive = (
        os.pipe()
    )  # `alive` is closed by the kernel when the stage ends; no program that it starts inherits it
    if os.fork() == 0:
        try:
            os.close(alive)
            _leave_the_terminal()
            os.read(ended, 1)
            kill_marked(own)
        finally:
            os._exit(0)
    os.close(ended)


def mark() -> str | None:
    """What marks the processes that this stage starts; None where nobody guards it."""
    return os.environ.get(_MARK)


def kill_marked(mark: str | None) -> None:
    """Kill every process with `mark` in the environment that it was started with, until there is none."""
    clean = 0 if mark else 2
    while clean < 2:  # a second look finds what was just being started when its parent was killed
        found = _marked(f"{_MARK}={mark}".encode(errors="replace"))
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        clean = 0 if found else clean + 1
        time.sleep(0.1)


def _marked(variable: bytes) -> list[int]:
    """Process ids; without Python's resource tracker, which removes the semaphores of those that it outlives, and then ends."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if variable in (process / "environ").read_bytes().split(b"\0"):
                found += (
                    [int(process.name)]
                    if b"resource_tracker" not in (process / "cmdline").read_bytes()
                    else []
                )
        except OSError:  # gone meanwhile, or another user's
            continue
    return found


def _leave_the_terminal() -> None:
    """No signal that is meant for the stage ends its guard, and no reader of the stage's output waits for it."""
    os.setsid()
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(sign, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
