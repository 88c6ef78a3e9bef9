"""Starting the processes of a distributed run, and making sure that none outlives its stage.

The launcher runs in a session of its own, so that Ctrl-C reaches the stage alone, which then ends the whole group.
Should the stage itself be killed, the kernel kills the launcher (PR_SET_PDEATHSIG), and its workers in turn, which call
`die_with_parent` when they start. Workers that other programs start in between call `end_with_stage` too.
"""

from __future__ import annotations

import ctypes
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.run.code import ROOT
from stages.run.errors import InputError, StageFailure

_PR_SET_PDEATHSIG = 1  # linux/prctl.h; prctl(2)
_STAGE = "TRN_TUNE_STAGE_PID"
GRACE_SECONDS = 5.0


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone (Linux; elsewhere the launcher's own care remains)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_stage() -> None:
    """End this process when the stage that launched it is gone, however many programs stand between them (Linux).

    A process that no stage has launched goes on by itself.
    """
    stage = os.environ.get(_STAGE)
    if stage is None or not hasattr(os, "pidfd_open"):
        return
    try:
        descriptor = os.pidfd_open(int(stage))
    except ProcessLookupError:
        os._exit(1)
    except OSError:  # a kernel or a sandbox without it
        return

    def wait() -> None:
        select.select([descriptor], [], [])  # readable when the process has ended
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def launch(command: list[str], environment: Mapping[str, str], error_file: Path, heard: Callable[[str], None] | None = None) -> None:
    """Run `command`, its program found on `environment`'s PATH, from the project's folder and wait for it.

    A worker that knows what went wrong writes `InputError` or `StageFailure` and its message to `error_file`
    (`report_error`); it is raised here. Any other failure is a StageFailure with the exit status. `heard` is given each
    line that the processes print, on either stream, after it is passed on.
    """
    error_file.unlink(missing_ok=True)
    whole_environment = {**os.environ, **environment, _STAGE: str(os.getpid())}
    program = shutil.which(command[0], path=whole_environment.get("PATH"))
    if program is None:
        raise InputError(f"{command[0]} is not on the PATH. Install what brings it, or run in the container (docker/run).")
    print(f"$ {shlex.join(_shown(command))}", flush=True)
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if heard else {}
    process = subprocess.Popen(
        [program, *command[1:]],
        env=whole_environment,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509 (what it asks of the kernel stays; threads here hold no lock that it takes)
        text=True,
        errors="replace",
        **streams,
    )
    try:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if heard:
                heard(line)
        status = process.wait()
    finally:
        _end(process)
    if error_file.exists():
        kind, _, message = error_file.read_text(encoding="utf-8").partition("\n")
        raise InputError(message.splitlines()) if kind == "InputError" else StageFailure(message)
    if status:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise StageFailure(f"The workers' launcher {how}; what they printed is above. Nothing was published.")


def report_error(error: InputError | StageFailure, error_file: Path) -> None:
    """For a worker: hand `error` to the stage that launched it. The first of several ranks is heard."""
    try:
        with error_file.open("x", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}\n{error}")
    except FileExistsError:
        pass


def _end(process: subprocess.Popen) -> None:
    """End what is left of the launcher's group: politely, then not."""
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
