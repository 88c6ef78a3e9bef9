"""BUDGET, DEADLINE and a spot instance's notice: what is counted, refused and ended."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from stages.checks import machine_problems
from stages.run import limits
from stages.run.errors import InputError, StageFailure, Stopped
from stages.run.layout import REHEARSAL_FOLDER, REHEARSAL_REPORT, STOP_FILE
from stages.run.limits import METADATA, Spent, limited, reached, require_within, spent, stopped
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings
from stages.run.sizes import parse_duration
from tests.fakes.metadata import metadata_service

HOURLY = Settings(budget=20.0, instance_price=10.0)  # two hours


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90min", 5400), (" 1.5 h ", 5400), ("30s", 30), ("", 0)]
)
def test_a_duration_has_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["2", "h", "-1h", "0h", "2 days", "1h30min", "nan"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not a duration"):
        Settings.read({"DEADLINE": text})


def test_a_limit_is_reached_by_what_was_spent_before_and_in_training() -> None:
    assert reached(HOURLY, Spent(3600, 3599)) == ""
    assert reached(HOURLY, Spent(3600, 3600)) == "BUDGET=20 USD (20.00 spent)"
    both = Settings(budget=20.0, instance_price=10.0, deadline="1h")
    assert reached(both, Spent(0, 7200)).endswith(" and DEADLINE=1h (2 h 00 min taken)")
    assert reached(Settings(), Spent(1e9, 1e9)) == ""


def test_a_training_that_would_break_a_limit_is_refused_with_the_numbers() -> None:
    require_within(HOURLY, Spent(600, 0), planned=6599)
    with pytest.raises(InputError, match=r"BUDGET=20 USD \(20.02 planned\): .* 1 h 50 min more"):
        require_within(HOURLY, Spent(600, 0), planned=6606)
    with pytest.raises(InputError, match="used up before this start"):
        require_within(HOURLY, Spent(0, 7200), planned=None)
    require_within(HOURLY, Spent(600, 0), planned=None)  # not known: it is ended when it gets there


def test_a_budget_without_a_price_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.run.cost.instance_type", lambda: None)
    (problem,) = machine_problems(Settings(budget=5.0, backend="torch"), ["train"])
    assert problem.startswith("BUDGET=5 USD: the price of this machine is not known.")
    priced = Settings(budget=5.0, backend="torch", instance_price=1.0)
    assert machine_problems(priced, ["train"]) == []


def test_all_starts_of_a_training_are_counted(tmp_path: Path) -> None:
    publish("data", Settings(), {}, tmp_path / "data", lambda _: StageResult(earlier_seconds=40.0))
    work = tmp_path / "work"
    work.mkdir()
    for _ in range(2):
        with limited(Settings(), work, tmp_path):
            time.sleep(0.2)
    so_far = spent(work, tmp_path)
    assert so_far.before >= 40.0 and 0.4 <= so_far.training < 5.0
    (work / limits.SPENT_FILE).write_text("{")
    assert spent(work, tmp_path).training == 0.0


def test_a_rehearsal_is_counted(tmp_path: Path) -> None:
    report = tmp_path / REHEARSAL_FOLDER / REHEARSAL_REPORT
    report.parent.mkdir()
    report.write_text('{"seconds": 90.5}')
    assert spent(tmp_path / "work", tmp_path) == Spent(90.5, 0.0)


def test_a_time_that_is_not_known_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    require_within(HOURLY, Spent(600, 0), planned=None)
    assert "how long the training takes is not known" in capsys.readouterr().out
    require_within(Settings(), Spent(600, 0), planned=None)
    require_within(HOURLY, Spent(600, 0), planned=60.0)
    assert capsys.readouterr().out == ""


def test_a_disk_that_takes_nothing_ends_no_watch(tmp_path: Path) -> None:
    in_the_way = tmp_path / f"{STOP_FILE}.writing"
    (tmp_path / limits.SPENT_FILE).write_text(json.dumps({"seconds": 7200}))
    watch = limits._Watch(HOURLY, tmp_path, spent(tmp_path, tmp_path))
    in_the_way.symlink_to("/dev/full")
    watch._stop(StageFailure("now"))
    assert stopped(tmp_path) is None and not in_the_way.is_symlink()
    watch._stop(StageFailure("now"))
    assert str(stopped(tmp_path)) == "now"


def wait_for_stop(work: Path) -> StageFailure:
    end = time.monotonic() + 20
    while (error := stopped(work)) is None:
        assert time.monotonic() < end, "the training was never asked to end"
        time.sleep(0.02)
    return error


def test_a_training_is_asked_to_end_at_its_limit(tmp_path: Path) -> None:
    (tmp_path / limits.SPENT_FILE).write_text(json.dumps({"seconds": 7200}))
    (tmp_path / STOP_FILE).write_text("StageFailure\nof a former start")
    with limited(HOURLY, tmp_path, tmp_path):
        error = wait_for_stop(tmp_path)
    assert not isinstance(error, Stopped) and error.exit_status == 1
    assert str(error) == "BUDGET=20 USD (20.00 spent) is used up. Raise it to go on."


def test_a_spot_instances_notice_ends_a_training_with_status_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NOTICE_SECONDS", 0.0)
    with metadata_service("2026-11-28T12:00:00Z") as address:
        monkeypatch.setenv(METADATA, address)
        with limited(Settings(), tmp_path, tmp_path):
            error = wait_for_stop(tmp_path)
    assert isinstance(error, Stopped) and error.exit_status == 75
    assert "at 2026-11-28T12:00:00Z" in str(error)


def test_a_metadata_service_that_does_not_answer_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with metadata_service("") as address:
        monkeypatch.setenv(METADATA, address)
        with limited(Settings(), tmp_path, tmp_path):
            pass
    assert capsys.readouterr().err == ""
    with limited(Settings(), tmp_path, tmp_path):  # nobody listens there any more
        pass
    assert f"{address} does not answer: no notice" in capsys.readouterr().err


def test_no_notice_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with metadata_service("") as address:
        assert limits.spot_notice(address) == ""
    assert limits.spot_notice(address) == ""  # nobody listens there any more
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv(METADATA, address)
    assert limits._metadata_address() == ""
