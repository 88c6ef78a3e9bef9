"""Starting processes: their errors come back as ours, and none is left."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from stages.run.errors import InputError, StageFailure
from stages.run.launch import launch, report_error


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_that_succeeds_is_silent(tmp_path: Path) -> None:
    launch(
        python("import os; assert os.environ['SETTING'] == '$5'"),
        {"SETTING": "$5"},
        tmp_path / "error",
    )


def test_an_exit_status_is_a_failure_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StageFailure, match="status 3"):
        launch(python("raise SystemExit(3)"), {}, tmp_path / "error")


def test_a_signal_is_a_failure_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StageFailure, match="SIGKILL"):
        launch(python("import os; os.kill(os.getpid(), 9)"), {}, tmp_path / "error")


@pytest.mark.parametrize(
    "error", [InputError(["first", "second"]), StageFailure("step 3: nan")], ids=repr
)
def test_what_a_worker_reports_is_raised_as_it_was(tmp_path: Path, error: Exception) -> None:
    file = tmp_path / "error"
    code = f"""
from pathlib import Path
from stages.run.errors import *
from stages.run.launch import report_error
report_error({error!r}, Path({str(file)!r})); raise SystemExit(1)
"""
    if isinstance(error, InputError):
        code = code.replace(repr(error), f"InputError({error.problems!r})")
    with pytest.raises(type(error)) as raised:
        launch(python(code), {}, file)
    assert str(raised.value) == str(error)


def test_the_first_of_several_ranks_is_heard(tmp_path: Path) -> None:
    report_error(StageFailure("first"), tmp_path / "error")
    report_error(StageFailure("second"), tmp_path / "error")
    assert (tmp_path / "error").read_text() == "StageFailure\nfirst"


def test_what_a_launcher_leaves_behind_is_ended(tmp_path: Path) -> None:
    leaves = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); open(sys.argv[1], "
        "'w').write(str(p.pid)); sys.exit(1)"
    )
    with pytest.raises(StageFailure):
        launch([*python(leaves), str(tmp_path / "pid")], {}, tmp_path / "error")
    left = Path("/proc") / (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 5
    while left.exists() and "sleep" in (left / "cmdline").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_line_is_passed_on_and_heard(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    on_line: list[str] = []
    launch(
        python("import sys; print('out', flush=True); print('err', file=sys.stderr)"),
        {},
        tmp_path / "error",
        on_line=on_line.append,
    )
    assert on_line == ["out\n", "err\n"]
    assert capfd.readouterr().out.endswith("out\nerr\n")


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neuron_parallel_compile is not on the PATH"):
        launch(["neuron_parallel_compile"], {"PATH": str(tmp_path)}, tmp_path / "error")
