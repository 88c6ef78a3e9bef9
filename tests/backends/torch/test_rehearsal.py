"""A rehearsal finds what makes a training another one, and says nothing where rounding is all."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stages.backends.band import Deviation, out_of_band, read_record, told
from stages.model.base import base_model_folder
from stages.model.cut import cut_model
from stages.rehearse import ALONE
from stages.run.settings import Settings
from tests.conftest import ROOT, clean_environment, torchrun
from tests.small_training import (
    base,  # noqa: F401 (a fixture)
    pack_with_metrics,
    small_rehearsal,
)
from tests.tiny_models import tiny_model

STEPS = 3
# Fault -> the step by which it is found, and a word of what is named first.
FOUND = {
    "half of the ranks' gradients are not summed": (1, "grad_norm"),
    "norms are not summed over the sequence's parts": (1, "norm"),
    "the learning rate never changes after step 1": (3, "learning_rate"),
    "documents see each other": (1, ""),
    "labels are shifted twice": (1, ""),
    "RoPE has another base": (1, ""),
    "dropout is left on": (1, ""),
    "a shard is another rank's": (0, "weight of model.layers.0.self_attn.q_proj.weight"),
    "norms drift between ranks": (2, "copies of a weight"),
}
OTHERS = ("gemma3_text", "qwen3")
LORA = {"lora_r": 4, "lora_dropout": 0.0, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def rehearsed(
    base: Settings,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of the records: of references, of runs as they should be, and of faults."""
    folder = tmp_path_factory.mktemp("rehearsal")
    small = small_rehearsal(base, STEPS)
    metrics = pack_with_metrics(small, folder / "data")
    cut_model(base_model_folder(small), 2, folder / "llama")
    for architecture in OTHERS:
        model = tiny_model(architecture, vocab_size=metrics["vocabulary"])
        model.save_pretrained(folder / architecture)
    run = {"nproc_per_node": 4, "tensor_parallel_size": 2, "bf16": True}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "full": ("llama", {}),
        "lora": ("llama", LORA),
        "seed": ("llama", {"seed": 7}),
        **{architecture: (architecture, {}) for architecture in OTHERS},
    }
    references = {
        f"{kind} {dtype}": [
            "",
            model,
            {**ALONE, "gradient_accumulation_steps": 2, **more, "bf16": dtype == "bfloat16"},
        ]
        for kind, (model, more) in kinds.items()
        for dtype in ("float32", "bfloat16")
    }
    runs: dict[str, list[Any]] = {
        **{kind: ["", model, {**run, **more}] for kind, (model, more) in kinds.items()},
        "full in float32": ["", "llama", {**run, "bf16": False}],
        "full, checkpointed": ["", "llama", {**run, "gradient_checkpointing": True}],
        "lora, alpha": ["", "llama", {**run, **LORA, "lora_alpha": 8.0}],
        **{fault: [fault, "llama", run] for fault in FOUND},
    }
    for processes, jobs in ((1, references), (4, runs)):
        (folder / "jobs.json").write_text(json.dumps(jobs))
        done = subprocess.run(
            [*torchrun(processes, "tests.backends.torch.planted_faults"), str(folder)],
            cwd=ROOT,
            env=clean_environment() | small.environment() | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


def found(folder: Path, kind: str, run: str) -> list[Deviation]:
    names = (f"{kind} float32", f"{kind} bfloat16", run)
    return out_of_band(*(read_record(folder / name / "record.jsonl") for name in names))


@pytest.mark.parametrize(
    ("kind", "run"),
    [
        ("full", "full"),
        ("full", "full in float32"),
        ("full", "full, checkpointed"),
        ("lora", "lora"),
        ("seed", "seed"),
        *((architecture, architecture) for architecture in OTHERS),
    ],
)
def test_two_by_two_processes_are_in_the_band_of_one(rehearsed: Path, kind: str, run: str) -> None:
    assert told(found(rehearsed, kind, run)) == []
    assert len(read_record(rehearsed / run / "record.jsonl")) == 1 + STEPS


@pytest.mark.parametrize("fault", FOUND)
def test_a_planted_fault_is_found_and_named(rehearsed: Path, fault: str) -> None:
    deviations = found(rehearsed, "full", fault)
    step, word = FOUND[fault]
    assert deviations and deviations[0].step == step, deviations[:2]
    assert word in str(deviations[0])


def test_another_seed_or_scale_of_an_adapter_is_another_training(rehearsed: Path) -> None:
    assert found(rehearsed, "lora", "lora, alpha")[0].step == 1
    assert found(rehearsed, "full", "seed")[0].step == 1
