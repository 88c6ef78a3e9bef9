"""No process that a stage starts outlives it, and no stage outlives its make, however they end.

A stage first forks a guard: a process in its own session that waits until the stage ends, by
whatever signal, and then kills its remaining descendants: launchers, ranks, compilers and their
children, in whatever session. It finds them by a mark in the environment, which they inherit.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from stages.run.errors import exception_chain

_PR_SET_PDEATHSIG = 1  # linux/prctl.h; prctl(2)
_MARK = "TRN_TUNE_STAGE"
_MAKE = "TRN_TUNE_MAKE"


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent ends; end it now if the parent is no
    longer `parent` (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def guard_stage() -> None:
    """Tie this stage to its make, whose process id the Makefile passes, and start the guard.

    Call it before there are threads. Children that are forked without an exec are not covered.
    """
    make = os.environ.pop(_MAKE, None)
    die_with_parent(int(make) if make else None)
    _repeat_interrupts()
    os.environ[_MARK] = own = os.urandom(8).hex()
    ended, alive = os.pipe()
    if os.fork() == 0:
        try:
            os.close(alive)
            _leave_the_terminal()
            os.read(ended, 1)
            kill_marked(own)
        finally:
            os._exit(0)
    os.close(ended)


def become(program: str, command: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Replace this stage by another program, which ends with make as the stage does. The guard
    ends, and leaves what the program starts to it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, command, {k: v for k, v in environment.items() if k != _MARK})


def _repeat_interrupts() -> None:
    """Raise KeyboardInterrupt again, every second, where it was swallowed: by a bare `except` or by
    a callback while a large library is imported."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # ignored: the stage runs in the background of a shell

    def interrupted(number: int, frame: object) -> None:
        handled = sys.exc_info()[1]
        if handled is None or not any(
            isinstance(error, KeyboardInterrupt) for error in exception_chain(handled)
        ):
            signal.setitimer(signal.ITIMER_REAL, 1)
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGALRM, interrupted)


def mark() -> str | None:
    """The mark of the processes that this stage starts; None where it has no guard."""
    return os.environ.get(_MARK)


def kill_marked(mark: str | None) -> None:
    """Kill every process that was started with `mark` in its environment, until there is none."""
    clean = 0 if mark else 2
    # Look twice: a process may just have been starting when its parent was killed.
    while clean < 2:
        found = _marked(f"{_MARK}={mark}".encode(errors="replace"))
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        clean = 0 if found else clean + 1
        time.sleep(0.1)


def _marked(variable: bytes) -> list[int]:
    """Ids of the marked processes, without Python's resource tracker: it removes the semaphores of
    processes that it outlives, and then ends."""
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
    """Let no signal for the stage end its guard, and no reader of its output wait for the guard."""
    os.setsid()
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(sign, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
