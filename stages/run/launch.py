"""Start the processes of a distributed run, and report why they failed.

The launcher runs in its own session, so that Ctrl-C reaches only the stage, which then ends the
whole group. If the stage itself is killed, its guard ends them (guard.py).
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.run.errors import InputError, StageFailure, Stopped
from stages.run.fingerprint import ROOT

ERROR_FILE = "TRN_TUNE_ERROR_FILE"
GRACE_SECONDS = 5.0
WAIT_SECONDS = 1.0


def launch(
    command: list[str],
    environment: Mapping[str, str],
    error_file: Path,
    on_line: Callable[[str], None] | None = None,
    who: str = "The workers' launcher",
    until: Callable[[], StageFailure | None] = lambda: None,
) -> None:
    """Run `command` from the project's folder and wait for it.

    Its program is looked up on `environment`'s PATH.

    A worker that knows what went wrong writes its error to `error_file` (`report_error`); it is
    raised here. Any other failure is a StageFailure with the exit status. `on_line` is called with
    each line that the processes print, on either stream, after it is printed. `who` is what the
    failure says has ended. An error that `until` gives ends the processes, and is raised; with
    `on_line` it is asked only when they print no more.
    """
    error_file.unlink(missing_ok=True)
    whole_environment = {**os.environ, **environment, ERROR_FILE: str(error_file.absolute())}
    program = shutil.which(command[0], path=whole_environment.get("PATH"))
    if program is None:
        raise InputError(
            f"{command[0]} is not on the PATH. Install the package that has it, or run in the "
            "container (docker/run)."
        )
    print(f"$ {shlex.join(_shown(command))}", flush=True)
    streams: dict[str, Any] = (
        {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if on_line else {}
    )
    process = subprocess.Popen(
        [program, *command[1:]],
        env=whole_environment,
        cwd=ROOT,
        start_new_session=True,
        text=True,
        errors="replace",
        **streams,
    )
    try:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if on_line:
                on_line(line)
        while (status := _status(process)) is None:
            if error := until():
                raise error
    finally:
        _end(process)
    _raise_failure(status, error_file, who)


def _status(process: subprocess.Popen[str]) -> int | None:
    """The exit status; None where the process still runs after a moment."""
    try:
        return process.wait(WAIT_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _raise_failure(status: int, error_file: Path, who: str) -> None:
    """Raise the error that a worker reported, or a StageFailure for an exit status that is not
    0."""
    if error_file.exists():
        kind, _, message = error_file.read_text(encoding="utf-8").partition("\n")
        if kind == InputError.__name__:
            raise InputError(message.splitlines())
        raise Stopped(message) if kind == Stopped.__name__ else StageFailure(message)
    if status:
        how = (
            f"was killed by {signal.Signals(-status).name}"
            if status < 0
            else f"ended with status {status}"
        )
        raise StageFailure(f"{who} {how}; what was printed is above. Nothing was published.")


def report_error(error: InputError | StageFailure, error_file: Path) -> None:
    """In a worker: pass `error` to the stage that launched it, or print it where the disk is full.

    Only the first of several errors is kept."""
    try:
        with error_file.open("x", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}\n{error}")
    except FileExistsError:
        pass
    except OSError:
        error_file.unlink(missing_ok=True)
        print(f"failed: {error}", file=sys.stderr, flush=True)


def _end(process: subprocess.Popen[str]) -> None:
    """End what remains of the launcher's group: SIGTERM, then SIGKILL."""
    deadline = time.monotonic() + GRACE_SECONDS
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        while sign == signal.SIGTERM and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    process.wait()


def _shown(command: list[str]) -> list[str]:
    return ["python" if part == sys.executable else part for part in command]
