"""The harness as a process for both models, and its figures. The process is a fake that refuses
and writes what version 0.4.13 does (tests/fakes/lm_eval.py)."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.backends.harness import (
    compared,
    harness_command,
    limit_note,
    link_model,
    measure_tasks,
    table,
)
from stages.run.errors import StageFailure
from stages.run.gates import gate_problems
from stages.run.harness import Harness
from stages.run.settings import Settings
from stages.text.tokens import TextTokenizer
from tests.conftest import ROOT
from tests.tiny_models import SIZES

RESULTS = json.loads((ROOT / "tests/fakes/lm_eval_results.json").read_text())
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A model with its tokenizer, as consolidate publishes it."""
    tokenizer = TextTokenizer.load(ROOT / "data/demo/model")
    sizes = {**SIZES, "vocab_size": tokenizer.vocab_size}
    folder = tmp_path / "consolidate"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(folder)
    tokenizer.save(folder)
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def settings(tmp_path: Path, tuned: Path) -> Settings:
    own = tmp_path / "own, 'tasks'"
    own.mkdir()
    (own / "mine.yaml").write_text("task: mine\n")
    return Settings(model_id=str(tuned), bf16=False, lm_eval="mine", lm_eval_include_path=str(own))


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    program = tmp_path / "lm_eval"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/fakes/lm_eval.py "$@"\n')
    program.chmod(0o755)
    return Harness(str(program), "", None)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work, 'eval'").mkdir()
    return tmp_path / "work, 'eval'"


def test_both_models_are_measured_and_stand_side_by_side(
    harness: Harness,
    settings: Settings,
    tuned: Path,
    work: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    measured = measure_tasks(harness, settings, tuned, work)["lm_eval"]
    assert (measured["version"], measured["dtype"], measured["limit"]) == ("0.4.13", "float32", 0)
    mine = measured["tasks"]["mine"]
    assert (mine["version"], mine["examples"], mine["num_fewshot"]) == ("1.0", 5, 0)
    assert mine["local"] and not measured["tasks"]["mine_group"]["local"]
    assert mine["metrics"]["acc"] == {
        **{"base": 0.25, "base_stderr": None},
        **{"fine_tuned": 1.0, "fine_tuned_stderr": 0.0},
    }
    assert list(work.iterdir()) == []
    shown = capfd.readouterr().out
    assert "mine (version 1.0, 5 examples)" in shown
    assert "    acc_norm                            0.8000 ± 0.2000    0.8000 ± 0.2000" in shown
    assert gate_problems("mine/acc>=1 mine_group/acc>0.5", {"lm_eval": measured}) == []


def test_without_tasks_nothing_is_started(settings: Settings, tuned: Path, work: Path) -> None:
    assert measure_tasks(None, settings, tuned, work) == {}


def test_a_harness_that_fails_says_which_model_it_measured(
    harness: Harness, settings: Settings, tuned: Path, work: Path
) -> None:
    with pytest.raises(StageFailure, match=r"lm_eval on the base model ended with status 1"):
        measure_tasks(harness, replace(settings, lm_eval="other"), tuned, work)
    assert list(work.iterdir()) == []


def test_a_harness_that_writes_nothing_is_a_failure(
    harness: Harness, settings: Settings, tuned: Path, work: Path
) -> None:
    Path(harness.program).write_text("#!/bin/sh\n")
    with pytest.raises(StageFailure, match="wrote 0 files of results"):
        measure_tasks(harness, settings, tuned, work)


def test_the_harness_sees_only_configs_weights_and_the_tokenizer(
    tuned: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").symlink_to(tuned / "config.json")
    for name in ("model.safetensors", "generation_config.json", "modeling.py", "tokenizer.json"):
        (base / name).write_text("base")
    (base / "custom_generate").mkdir()
    link_model(base, tuned, tmp_path / "links")
    linked = {path.name: path.resolve() for path in (tmp_path / "links").iterdir()}
    assert linked.pop("config.json") == tuned / "config.json"
    assert linked.pop("model.safetensors") == base / "model.safetensors"
    assert linked and all(path.parent == tuned for path in linked.values())
    assert all("token" in name for name in linked)


def command(settings: Settings, device: torch.device) -> str:
    harness = Harness("lm_eval", "0.4.13", None)
    return " ".join(
        harness_command(harness, settings, Path("/m"), Path("/o.json"), "bfloat16", device)
    )


def test_the_command_bounds_what_the_harness_does() -> None:
    some = Settings(lm_eval="arc_easy hellaswag", lm_eval_limit=10)
    assert command(some, GPU) == (
        'lm_eval --model hf --model_args {"pretrained": "/m", "dtype": "bfloat16", '
        '"trust_remote_code": false} --tasks arc_easy,hellaswag --device cuda --batch_size auto '
        "--output_path /o.json --limit 10"
    )
    assert command(replace(some, lm_eval_limit=0), CPU).endswith(
        "--device cpu --batch_size 1 --output_path /o.json"
    )


def test_a_limit_is_said_and_so_is_none_on_a_cpu() -> None:
    assert "at most the first 10 examples of each task" in limit_note(10, GPU)
    assert "LM_EVAL_LIMIT=100 takes the first 100" in limit_note(0, CPU)
    assert limit_note(0, GPU) == ""


def test_figures_that_are_no_numbers_or_of_one_model_are_not_measured() -> None:
    row: dict[str, Any] = {"alias": "t", "bleu,strict": float("nan"), "bleu_stderr,strict": "N/A"}
    tasks = compared({"results": {}}, {"results": {"t": row}}, set())
    assert tasks["t"]["metrics"] == {
        "bleu,strict": dict.fromkeys(
            ("base", "base_stderr", "fine_tuned", "fine_tuned_stderr"), None
        )
    }
    assert table(tasks, "")[-1].split() == ["bleu,strict", *["not", "measured"] * 2]


def test_a_group_has_figures_of_its_own() -> None:
    group = compared(RESULTS, RESULTS, set())["mine_group"]
    assert (group["version"], group["examples"]) == ("2.0", 5) and list(group["metrics"]) == ["acc"]
