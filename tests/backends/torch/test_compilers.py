"""The processes that compile: what they are given, what they return, and how they end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import pytest

from stages.backends.device import device_of
from stages.backends.torch import compilers
from stages.run.errors import StageFailure
from stages.run.settings import Settings
from tests.torture import processes


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compilers, "IMPORTED", ["torch"])  # the others would take 7 s
    with compilers.compilers(tmp_path, device_of(Settings())):
        yield


def length_of(variable: str) -> int:
    return len(os.environ[variable])


def end(signal_number: int) -> int:
    """Ends this process by the signal; 0 is none, and then a minute passes."""
    if signal_number:
        os.kill(os.getpid(), signal_number)
    time.sleep(60)
    return 0


def fail() -> int:
    raise StageFailure("no compiler")


@pytest.mark.parametrize("at_once", [1, 2])
def test_each_job_has_the_environment_that_the_stage_has_now(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORT", "ab")
    monkeypatch.setenv("LONG", "abcdef")
    lengths = compilers.run_compilers(length_of, [("SHORT",), ("LONG",)], at_once)
    assert sorted(lengths) == [2, 6]


def test_a_process_that_is_killed_ends_the_others_and_is_a_failure_with_a_remedy() -> None:
    with pytest.raises(StageFailure, match=r"killed before it was ready.*INFERENCE_BATCH_SIZE"):
        compilers.run_compilers(end, [(signal.SIGKILL,), (0,)], 2)
    assert not active_children()


def test_an_error_of_a_job_is_raised() -> None:
    with pytest.raises(StageFailure, match="no compiler"):
        compilers.run_compilers(fail, [()], 1)


def test_a_server_that_is_killed_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.getpid()
    children = map(int, Path(f"/proc/{own}/task/{own}/children").read_text().split())
    (server,) = (pid for pid in children if "forkserver import" in processes.command_line(pid))
    os.kill(server, signal.SIGKILL)
    assert processes.wait_for(lambda: not processes.is_alive(server), 10)
    monkeypatch.setenv("LONG", "abcdef")
    assert compilers.run_compilers(length_of, [("LONG",)], 1) == [6]
