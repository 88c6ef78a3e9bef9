"""What a stage has started ends with it, whatever ends the stage, and the stage ends with its
make."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.run.fingerprint import ROOT
from stages.run.guard import kill_marked

STAGE = """
import signal, subprocess, sys
from stages.run.guard import guard_stage
# A shell that starts the tests in the background ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
guard_stage()
subprocess.call([sys.executable, "-c", *sys.argv[1:]], start_new_session=True)
"""
# A program with a session of its own that starts another, as torchrun, compilers and their drivers
# do.
PROGRAM = (
    "import subprocess, sys; subprocess.call([sys.executable, '-c', *sys.argv[1:]], "
    "start_new_session=True)"
)
WORKER = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: str) -> bool:
    try:
        return bool((Path("/proc") / pid / "cmdline").read_bytes())  # a zombie has no command line
    except OSError:
        return False


@pytest.mark.parametrize(
    "sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda sign: sign.name
)
def test_a_worker_behind_other_programs_ends_with_a_stage_that_is_killed(
    sign: signal.Signals, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    stage = subprocess.Popen(
        [sys.executable, "-c", STAGE, PROGRAM, WORKER, str(pid)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: pid.exists() and bool(pid.read_text()))
    assert is_running(pid.read_text())
    stage.send_signal(sign)
    stage.wait()
    wait_until(lambda: not is_running(pid.read_text()))


SWALLOWS = """
import signal, time
from stages.run.cli import with_exit_status
from stages.run.guard import guard_stage
signal.signal(signal.SIGINT, signal.default_int_handler)
guard_stage()
def work():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except:
        print("swallowed", flush=True)
    try:
        time.sleep(60)
    finally:
        time.sleep(1.5)  # cleaning up is not interrupted again
        print("cleaned", flush=True)
with_exit_status(work)
"""


def test_ctrl_c_ends_a_stage_even_where_a_library_swallows_it_once() -> None:
    stage = subprocess.Popen(
        [sys.executable, "-c", SWALLOWS], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert stage.stdout is not None and stage.stdout.readline() == b"ready\n"
    stage.send_signal(signal.SIGINT)
    printed, told = stage.communicate(timeout=30)
    assert (printed, stage.returncode) == (b"swallowed\ncleaned\n", 130)
    assert told.startswith(b"interrupted:") and b"Traceback" not in told


def test_a_stage_whose_make_died_before_it_could_look_ends_at_once() -> None:
    code = "from stages.run.guard import guard_stage; guard_stage(); print('went on')"
    environment = {**os.environ, "TRN_TUNE_MAKE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_without_a_mark_nobody_is_ended() -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    kill_marked(None)
    kill_marked("")
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
