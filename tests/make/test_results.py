"""`make status`, `why`, `history`, `compare` and `adopt`: what they say and what they leave."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.make import history
from stages.make.adopt import adopt
from stages.make.results import facts
from stages.make.stale import stale_stages
from stages.make.status import print_status, print_why
from stages.run.errors import InputError
from stages.run.layout import MANIFEST_FILE
from stages.run.manifest import manifest_of, with_checksum
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings

GRAPH = {"data": [], "train": ["data"], "consolidate": ["train"]}
SPLIT = {"documents": 1234, "rows": 56}


def made(run: Path, settings: Settings, loss: float = 2.5) -> Settings:
    """A run with data and train published; what they wrote follows from the loss alone."""
    results: dict[str, dict[str, Any]] = {
        "data": {"train": SPLIT, "max_length": 64},
        "train": {"step": 7, "loss": loss},
    }
    for stage, metrics in results.items():

        def build(work: Path, metrics: dict[str, Any] = metrics) -> StageResult:
            (work / "result").write_text(json.dumps(metrics))
            return StageResult(metrics=metrics)

        publish(stage, settings, {name: run / name for name in GRAPH[stage]}, run / stage, build)
    return settings


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made(tmp_path / "outputs" / "one", Settings(instance_price=36.0))
    return tmp_path / "outputs" / "one"


def status(run: Path, settings: Settings) -> None:
    print_status(stale_stages(GRAPH, run, settings), GRAPH, [], run)


def test_status_says_of_each_stage_when_how_long_what_it_cost_and_its_main_number(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    status(run, Settings())
    data, of_data, _, of_train, consolidate = capsys.readouterr().out.splitlines()
    assert data.split() == ["data", "up", "to", "date"]
    assert of_data.endswith(" USD, 1,234 documents, 56 sequences of 64 tokens")
    assert of_train.strip().startswith("20") and "0 s, 0.0" in of_train
    assert of_train.endswith("step 7, loss 2.5")
    assert consolidate.strip() == "consolidate  to run: nothing published yet"


def test_status_has_a_line_for_every_other_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run.with_name("other")
    made(other, Settings(), loss=1.5)
    (run.with_name("empty")).mkdir()
    manifest = json.loads((other / "data" / MANIFEST_FILE).read_text()) | {"content": "another"}
    (other / "data" / MANIFEST_FILE).write_text(json.dumps(with_checksum(manifest)))
    capsys.readouterr()
    status(run, Settings())
    *_, head, line = capsys.readouterr().out.splitlines()
    assert head == "other runs (RUN=NAME):" and line.startswith("  other  2 of 3 stages, 20")
    assert line.endswith("step 7, loss 1.5, train is of other inputs")


def test_a_manifest_of_another_version_has_no_main_number_and_breaks_nothing(run: Path) -> None:
    manifest = manifest_of(run / "train") or {}
    for metrics in (None, {}, {"step": "x"}, [], {"step": 1, "loss": None}):
        assert "loss" not in facts({**manifest, "metrics": metrics})
    assert facts({}) == ""


def test_why_gives_every_reason_and_what_follows(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(learning_rate=1e-4, seed=7, max_length=128)
    stale = stale_stages(GRAPH, run, settings)
    capsys.readouterr()
    print_why("train", stale, GRAPH, run)
    said = capsys.readouterr().out
    assert "  LEARNING_RATE 5e-05 -> 0.0001\n" in said and "  SEED 42 -> 7\n" in said
    assert "MAX_LENGTH" in said and "same content: consolidate\n" in said
    print_why("data", stale_stages(GRAPH, run, Settings()), GRAPH, run)
    assert capsys.readouterr().out.startswith("data: up to date: 20")


def test_an_adopted_output_is_up_to_date_and_its_manifest_says_so(run: Path) -> None:
    before = manifest_of(run / "train") or {}
    changed = Settings(learning_rate=1e-4)
    assert adopt("train", changed, ["data"], run) == ["LEARNING_RATE 5e-05 -> 0.0001"]
    assert "train" not in stale_stages(GRAPH, run, changed)
    manifest = manifest_of(run / "train") or {}
    assert manifest["provenance"] == before["provenance"], "what it was really made from"
    assert manifest["content"] == before["content"]
    assert manifest["adopted"][0]["in_spite_of"] == ["LEARNING_RATE 5e-05 -> 0.0001"]
    assert facts(manifest).endswith("adopted")
    # Another change makes it stale as ever, and so does the way back.
    assert "train" in stale_stages(GRAPH, run, replace(changed, seed=7))
    assert stale_stages(GRAPH, run, Settings())["train"] == ["LEARNING_RATE 0.0001 -> 5e-05"]
    adopt("train", Settings(), ["data"], run)
    assert len((manifest_of(run / "train") or {})["adopted"]) == 2


def test_what_was_adopted_is_no_longer_of_other_inputs(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(run.with_name("new"), Settings(), loss=1.5)
    manifest = json.loads((run / "data" / MANIFEST_FILE).read_text()) | {"content": "another"}
    (run / "data" / MANIFEST_FILE).write_text(json.dumps(with_checksum(manifest)))
    status(run.with_name("new"), Settings())
    assert "train is of other inputs" in capsys.readouterr().out
    adopt("train", Settings(), ["data"], run)
    status(run.with_name("new"), Settings())
    assert "of other inputs" not in capsys.readouterr().out


def test_nothing_is_adopted_that_is_missing_damaged_or_up_to_date(run: Path) -> None:
    changed = Settings(learning_rate=1e-4)
    with pytest.raises(InputError, match="differs in nothing"):
        adopt("train", Settings(), ["data"], run)
    with pytest.raises(InputError, match="nothing published yet"):
        adopt("consolidate", changed, ["train"], run)
    with pytest.raises(InputError, match="nothing published yet"):
        adopt("train", changed, ["data"], run.with_name("none"))
    assert not run.with_name("none").exists()
    (run / "train" / "result").unlink()
    with pytest.raises(InputError, match=r"result is missing\. Make it again"):
        adopt("train", changed, ["data"], run)
    assert "adopted" not in (manifest_of(run / "train") or {})


@pytest.mark.parametrize("adopted", [3, [3], [{}], [{"provenance": 3}], [{"provenance": {}}]])
def test_a_manifest_with_a_sealed_but_senseless_adoption_counts_as_none(
    run: Path, adopted: object
) -> None:
    manifest = {**(manifest_of(run / "train") or {}), "adopted": adopted}
    (run / "train" / MANIFEST_FILE).write_text(json.dumps(with_checksum(manifest)))
    assert manifest_of(run / "train") is None


def test_history_keeps_what_was_replaced_and_says_what_was_changed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(run, Settings(learning_rate=1e-4), loss=2.25)
    made(run, Settings(learning_rate=1e-4, seed=7), loss=2.125)
    lines = "\n".join(history.history(run, list(GRAPH)))
    assert [lines.index(f"loss {loss}") for loss in (2.5, 2.25, 2.125)] == sorted(
        lines.index(f"loss {loss}") for loss in (2.5, 2.25, 2.125)
    )
    assert "after: LEARNING_RATE 5e-05 -> 0.0001" in lines and "after: SEED 42 -> 7" in lines
    former = next((run / ".history" / "train").glob("*.json"))
    for damaged in ("{", '{"provenance": {"settings": {}}}'):
        former.write_text(damaged)
        assert history.history(run, ["train"])
        assert f"note: {former} is damaged" in capsys.readouterr().err
    assert history.history(run / "none", ["train"])[0].endswith("nothing was published yet")


def test_compare_shows_the_settings_that_differ_and_the_results(run: Path) -> None:
    made(run.with_name("other"), Settings(learning_rate=1e-4), loss=1.5)
    lines = history.compare([run, run.with_name("other")], list(GRAPH))
    assert lines[0].split() == ["one", "other"]
    assert lines[1].split() == ["LEARNING_RATE", "5e-05", "0.0001"]
    assert ["loss", "2.5", "loss", "1.5"] in [line.split() for line in lines]
    assert not any("SEED" in line for line in lines)


def test_compare_says_which_settings_a_run_did_not_record(run: Path) -> None:
    made(run.with_name("other"), Settings())
    shutil.rmtree(run.with_name("other") / "train")
    lines = [line.split() for line in history.compare([run, run.with_name("other")], list(GRAPH))]
    assert ["LEARNING_RATE", "5e-05", "not", "recorded"] in lines


@pytest.mark.parametrize("runs", ["", "one", "one none", "one ../outputs/one"])
def test_compare_refuses_runs_that_are_not_there(
    run: Path, runs: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUNS", runs)
    monkeypatch.setattr(history, "OUTPUTS", run.parent)
    with pytest.raises(SystemExit) as ended:
        history.main("--compare", *GRAPH)
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err
