"""What the page says is to be watched, each with its number."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stages.page.facts import facts_of
from stages.page.notes import notes_of
from stages.page.render import render
from stages.run.settings import Settings
from tests.page.run_folder import DATA, EVAL, compare, log_steps, publish


def figures(run: Path, word: str) -> list[str]:
    return [note.figure for note in notes_of(facts_of(run, Settings())) if word in note.text]


def test_a_validation_loss_that_rises_after_its_lowest_is_over_fitting(tmp_path: Path) -> None:
    log_steps(tmp_path / "train", [3.0, 2.0, 1.0], {1: 2.5, 2: 2.0, 3: 2.2})
    assert figures(tmp_path, "Over-fitting") == ["+10.0%"]


def test_a_validation_loss_that_falls_is_not(tmp_path: Path) -> None:
    log_steps(tmp_path / "train", [3.0, 2.0, 1.0], {1: 2.5, 2: 2.2, 3: 2.1})
    assert not figures(tmp_path, "Over-fitting")


def test_what_was_cut_dropped_and_repeated_has_its_number(tmp_path: Path) -> None:
    lossy = {"over_long": 5, "dropped": 2, "cut_tokens": 40, "dropped_tokens": 200, "duplicate": 3}
    publish(tmp_path, "data", {**DATA, **lossy})
    assert figures(tmp_path, "Truncation: 40 tokens were cut off 3 documents") == ["1.0%"]
    assert figures(tmp_path, "2 documents, 200 tokens, were left out") == ["5.0%"]
    assert figures(tmp_path, "text of an earlier one") == ["3"]


@pytest.mark.parametrize(("backend", "said"), [("neuron", ["1.5"]), ("torch", [])])
def test_packing_leaks_on_optimum_neuron_only(
    tmp_path: Path, backend: str, said: list[str]
) -> None:
    publish(tmp_path, "data", DATA)
    publish(tmp_path, "train", {}, {"BACKEND": backend})
    assert figures(tmp_path, "Leaky packing") == said


def test_a_model_that_got_no_better_is_said(tmp_path: Path) -> None:
    publish(tmp_path, "eval", {**EVAL, "fine_tuned": {"loss": 3.25, "perplexity": 25.8}})
    assert figures(tmp_path, "not below the base model's (3.0000)") == ["+0.250"]


def test_a_stage_that_was_made_from_another_output_is_said(tmp_path: Path) -> None:
    publish(tmp_path, "data", DATA)
    publish(tmp_path, "eval", EVAL, inputs={"data": "0123456789abcdef"})
    assert figures(tmp_path, "eval was made from another output of data") == ["01234567"]


def test_a_manifest_of_another_version_has_a_page(tmp_path: Path) -> None:
    lacking = {"seconds": None, "usd": None, "versions": None, "forecast": None}
    for stage in ("data", "train", "consolidate", "eval"):
        publish(tmp_path, stage, None, **lacking)  # type: ignore[arg-type]
    assert "not measured" in render(facts_of(tmp_path, Settings()))


def test_a_killed_training_shows_its_steps(tmp_path: Path) -> None:
    log_steps(tmp_path / ".work" / "train-abc", [3.0, 2.5], {})
    facts = facts_of(tmp_path, Settings())
    assert figures(tmp_path, "a training that has not finished") == ["step 2"]
    assert "not finished" in render(facts)


def test_steps_of_a_training_that_was_given_up_before_are_not_shown(tmp_path: Path) -> None:
    log_steps(tmp_path / ".work" / "train-abc", [3.0, 2.5], {})
    os.utime(tmp_path / ".work" / "train-abc" / "metrics.jsonl", (0, 1))
    log_steps(tmp_path / "train", [3.0, 2.0, 1.0], {})
    facts = facts_of(tmp_path, Settings())
    assert len(facts.steps) == 3 and not facts.unfinished


def test_every_subset_of_the_stages_has_a_page(tmp_path: Path) -> None:
    stages = {"data": DATA, "precompile": {}, "train": {}}
    stages |= {"consolidate": {"parameters": 10_000_000}, "compile-inference": {}, "eval": EVAL}
    for count in range(len(stages) + 1):
        run = tmp_path / str(count)
        run.mkdir()
        for stage in [*stages][:count]:
            publish(run, stage, stages[stage], {"INIT_WEIGHTS": "pretrained"})
        page = render(facts_of(run, Settings()))
        missing = ", ".join([*stages][count:])
        assert (f"{missing}: nothing published yet" in page) == bool(missing)
    assert "10.0 million parameters" in page and "2.000" in page


def test_the_forecast_of_a_manifest_is_shown_beside_what_was_measured(tmp_path: Path) -> None:
    forecast = {"peak_memory_bytes": {"planned": 2_000_000_000, "measured": 2_100_000_000}}
    forecast["seconds"] = {"planned": None, "measured": 61.0}
    publish(tmp_path, "train", {}, forecast=forecast)
    page = " ".join(render(facts_of(tmp_path, Settings())).split())
    assert "<td>2 GB</td><td>2.1 GB</td><td>+5.0%</td>" in page
    assert "<td>unknown</td><td>1 min 01 s</td><td></td>" in page


def test_a_damaged_file_is_said_and_hides_nothing_else(tmp_path: Path) -> None:
    publish(tmp_path, "eval", EVAL)
    publish(tmp_path, "data", DATA)
    (tmp_path / "data" / "manifest.json").write_text("{")
    compare(tmp_path, ("q", "a", "b", "c"))
    with (tmp_path / "eval" / "comparison.jsonl").open("a") as file:
        file.write('{"cut')
    page = render(facts_of(tmp_path, Settings()))
    assert "data: manifest.json is damaged" in page and "7.39" in page


def test_what_repeats_and_what_looks_like_a_secret_is_said(tmp_path: Path) -> None:
    repeated = {"compared": 95, "near": 7, "held_out": 10, "near_training": 2, "not_compared": 0}
    repeated |= {"asked_in_training": 3, "prompts": 5, "prompts_in_training": 4}
    found = {"e-mail address": 6, "AWS access key": 1}
    publish(tmp_path, "data", {**DATA, "repeated": repeated, "sensitive": found})
    assert figures(tmp_path, "nearly equal an earlier one") == ["7 of 95"]
    assert figures(tmp_path, "nearly equal one that is trained on") == ["2 of 10"]
    assert figures(tmp_path, "ask what a document asks that is trained on") == ["3 of 10"]
    assert figures(tmp_path, "Questions in PROMPTS are trained on") == ["4 of 5"]
    assert figures(tmp_path, "AWS access key 1, e-mail address 6") == ["7"]


def test_an_adopted_output_is_named_with_what_it_was_adopted_in_spite_of(tmp_path: Path) -> None:
    adopted = {"at": "2026-11-28T15:00:00Z", "in_spite_of": ["SEED 42 -> 7"]}
    adopted["provenance"] = {"settings": {}, "versions": {}, "code": {}, "inputs": {}}  # type: ignore[assignment]
    publish(tmp_path, "train", {}, adopted=[adopted])
    assert figures(tmp_path, "train was adopted in spite of SEED 42 -> 7.") == ["2026-11-28"]
