"""What a make under test has started, as /proc tells it, and sending it signals."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container
from pathlib import Path

# in the environment of each make under test, and so in that of all that it starts
MARK = "TORTURED_MAKE"


def living(mark: str) -> dict[int, str]:
    """Process id -> command line of what carries `mark`, a guard that is still at work included;
    zombies are dead."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0")
                and _state(process) != "Z"
            ):
                found[int(process.name)] = command_line(int(process.name))
        except OSError:
            continue
    return found


def command_line(pid: int) -> str:
    return (
        (Path("/proc") / str(pid) / "cmdline")
        .read_bytes()
        .replace(b"\0", b" ")
        .decode(errors="replace")
        .strip()
    )


def parent_of(pid: int) -> int:
    return int(_stat(Path("/proc") / str(pid))[1])


def forked_by(pid: int, others: Container[int]) -> bool:
    """Whether the process lives, and one of `others` is its parent."""
    try:
        return parent_of(pid) in others
    except OSError:
        return False


def wait_for(
    what: Callable[[], object],
    seconds: float,
    while_true: Callable[[], bool] = lambda: True,
    every: float = 0.003,
) -> object:
    """The first true answer of `what`; None when there was none in time, or `while_true` is no
    longer so."""
    deadline = time.monotonic() + seconds
    while True:
        going = while_true()
        if found := what():
            return found
        if not going or time.monotonic() > deadline:
            return None
        time.sleep(every)


def is_alive(pid: int) -> bool:
    try:
        return _state(Path("/proc") / str(pid)) != "Z"
    except OSError:
        return False


def send(pid: int, sign: int, to_group: bool = False) -> bool:
    """Whether a living process was there to be sent the signal."""
    if not is_alive(pid):
        return False
    try:
        os.killpg(pid, sign) if to_group else os.kill(pid, sign)
    except ProcessLookupError:
        return False
    return True


def _state(process: Path) -> str:
    return _stat(process)[0]


def _stat(process: Path) -> list[str]:
    return (
        (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
    )  # the name before it may hold spaces
