"""Publishing: whole or not at all, whatever happens in between; one stage at a time in a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.run import publish as publishing
from stages.run.errors import StageFailure
from stages.run.fingerprint import ROOT
from stages.run.lock import locked
from stages.run.provenance import manifest_of
from stages.run.publish import StageResult, publish, remove_published
from stages.run.settings import Settings


def writes(text: str, **facts):
    """A build that writes one file."""

    def build(work: Path) -> StageResult:
        (work / "part").mkdir(exist_ok=True)
        (work / "part" / "file.txt").write_text(text)
        return StageResult(**facts)

    return build


def fails(work: Path) -> StageResult:
    (work / "file.txt").write_text("half")
    raise StageFailure("it broke")


def run(build, output: Path, settings: Settings | None = None, resumable: bool = False) -> bool:
    return publish("data", settings or Settings(), {}, output, build, resumable)


def test_what_was_published_is_not_built_again(tmp_path: Path) -> None:
    assert run(writes("one"), tmp_path / "run" / "data")
    assert not run(writes("two"), tmp_path / "run" / "data")
    assert (tmp_path / "run/data/part/file.txt").read_text() == "one"


def test_another_setting_replaces_the_output_and_leaves_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "run" / "data"
    run(writes("one"), output)
    assert run(writes("two"), output, Settings(max_length=64))
    assert (output / "part/file.txt").read_text() == "two"
    assert {path.name for path in output.parent.iterdir()} == {"data", ".lock", ".history"}


def test_without_an_atomic_exchange_the_output_is_replaced_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_exchange", lambda one, other: False)
    test_another_setting_replaces_the_output_and_leaves_nothing_else(tmp_path)


@pytest.mark.parametrize(
    "error", [StageFailure("it broke"), KeyboardInterrupt(), OSError("disk full")], ids=repr
)
def test_a_failure_leaves_the_former_output_and_no_rubbish(
    tmp_path: Path, error: BaseException
) -> None:
    def build(work: Path) -> StageResult:
        (work / "half.txt").write_text("half")
        raise error

    output = tmp_path / "run" / "data"
    run(writes("one"), output)
    with pytest.raises(type(error)):
        run(build, output, Settings(max_length=64))
    assert (output / "part/file.txt").read_text() == "one"
    assert {path.name for path in output.parent.iterdir()} == {"data", ".lock"}


def test_work_that_can_be_resumed_is_found_again_by_the_same_settings_alone(tmp_path: Path) -> None:
    output = tmp_path / "run" / "data"
    with pytest.raises(StageFailure):
        run(fails, output, resumable=True)
    found = []

    def resumes(work: Path) -> StageResult:
        found.append((work / "file.txt").exists())
        return StageResult()

    run(resumes, output, Settings(max_length=64), resumable=True)
    run(resumes, output, resumable=True)
    assert found == [False, True]


def test_a_kill_behind_the_exchange_does_not_pass_the_former_output_off_as_finished_work(
    tmp_path: Path, monkeypatch
) -> None:
    """The work folder then holds the output that was replaced, whole, under the name of the
    settings that replaced it."""
    output = tmp_path / "run" / "data"
    one, two = Settings(max_length=64), Settings(max_length=128)
    run(writes("one"), output, one, resumable=True)
    exchange = publishing._exchange

    def killed(left: Path, right: Path) -> bool:
        exchange(left, right)
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "_exchange", killed)
        with pytest.raises(SystemExit):
            run(writes("two"), output, two, resumable=True)
    run(writes("one"), output, one, resumable=True)
    found = []

    def looks(work: Path) -> StageResult:
        found.extend(path.name for path in work.iterdir())
        return StageResult()

    run(looks, output, two, resumable=True)
    assert found == []
    assert {path.name for path in output.parent.iterdir()} == {"data", ".lock", ".history"}


def test_work_that_was_finished_but_not_yet_published_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run" / "data"

    def killed(output: Path, work: Path) -> None:
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "_replace", killed)
        with pytest.raises(SystemExit):
            run(writes("one"), output, resumable=True)
    found = []

    def looks(work: Path) -> StageResult:
        found.append((work / "part" / "file.txt").read_text())
        return StageResult()

    run(looks, output, resumable=True)
    assert found == ["one"]
    assert not run(writes("two"), output, resumable=True)


KILLED = """
import sys, time
from pathlib import Path
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings
def build(work):
    for i in range(200):
        (work / f"{i}.txt").write_text("x" * 10000)
    return StageResult()
print("go", flush=True)
publish("data", Settings(max_length=int(sys.argv[2])), {}, Path(sys.argv[1]), build)
"""


def test_killed_at_any_moment_it_leaves_the_former_output_or_the_new_one(tmp_path: Path) -> None:
    output = tmp_path / "run" / "data"
    run(writes("one"), output)
    for moment in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(output), str(100 + moment)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        time.sleep(moment * 0.012)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        manifest = manifest_of(output)
        assert manifest is not None
        for name, facts in manifest["outputs"].items():
            assert (output / name).stat().st_size == facts["bytes"]
    assert run(writes("two"), output, Settings(max_length=64))
    assert {path.name for path in output.parent.iterdir()} == {"data", ".lock", ".history"}


def test_the_content_digest_leaves_out_what_differs_from_run_to_run(tmp_path: Path) -> None:
    def build(text: str):
        def write(work: Path) -> StageResult:
            (work / "weights").write_text("same")
            (work / "metrics.jsonl").write_text(text)
            return StageResult(unkeyed=("metrics.jsonl",))

        return write

    contents = []
    for run_name in ("a", "b"):
        run(build(run_name), tmp_path / run_name / "data")
        contents.append(manifest_of(tmp_path / run_name / "data")["content"])
    assert contents[0] == contents[1]


def test_a_clock_that_is_set_back_gives_no_negative_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(work: Path) -> StageResult:
        monkeypatch.setattr(time, "time", lambda: 0.0)
        return StageResult(tokens=1)

    run(build, tmp_path / "run" / "data")
    assert (manifest_of(tmp_path / "run" / "data") or {})["seconds"] >= 0


def test_a_part_that_is_removed_is_written_down_as_removed(tmp_path: Path) -> None:
    output = tmp_path / "run" / "data"
    run(writes("one"), output)
    remove_published(output, "part", because="KEEP_SHARDS=0")
    manifest = json.loads((output / "manifest.json").read_text())
    assert (
        manifest["removed"] == "KEEP_SHARDS=0"
        and manifest["outputs"] == {}
        and not (output / "part").exists()
    )
    assert not run(writes("two"), output)


def test_a_second_stage_waits_and_says_for_whom(tmp_path: Path) -> None:
    wait = (
        "from pathlib import Path; import sys; from stages.run.lock import locked\nwith "
        "locked(Path(sys.argv[1]), 'eval'): print('in')"
    )
    with locked(tmp_path, "train"):
        second = subprocess.Popen(
            [sys.executable, "-c", wait, str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        said = second.stderr.readline()
        assert f"waiting for train (process {os.getpid()}" in said
        assert second.poll() is None
    assert second.communicate(timeout=10)[0] == "in\n"
