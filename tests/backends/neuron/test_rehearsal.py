"""A rehearsal finds what makes a training with optimum-neuron another one, and says nothing where
rounding is all."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from stages.backends.band import Deviation, out_of_band, read_record, told
from stages.backends.neuron.arguments import environment, training_command
from stages.backends.neuron.record import write_record
from stages.backends.record import RECORDS, TOGETHER
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

pytest.importorskip("optimum.neuron", reason="optimum-neuron has no release for this Python")

FAKES = ROOT / "tests" / "fakes"
STEPS = 3
RUN: dict[str, Any] = {"backend": "neuron", "bf16": True, "nproc_per_node": 4}
RUN |= {"tensor_parallel_size": 2, "warmup_steps": 0, "logging_steps": 1, "save_steps": 0}
# Fault -> the step by which it is found, and a word of what is named first.
FOUND = {
    "half of the ranks' gradients are not summed": (1, ""),
    "norms are not summed over the sequence's parts": (1, ""),
    "the learning rate never changes after step 1": (2, "learning_rate"),
    "tokens see those after them": (1, ""),
    "labels are shifted twice": (1, ""),
    "RoPE has another base": (1, ""),
    "dropout is left on": (1, ""),
    "a shard is another rank's": (1, ""),
    "norms drift between ranks": (2, "copies of a weight"),
    "another seed": (1, ""),
}


@pytest.fixture(scope="module")
def rehearsed(
    base: Settings,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of the records: of references, of runs as they should be, and of faults."""
    folder = tmp_path_factory.mktemp("rehearsal")
    small = small_rehearsal(base, STEPS)
    pack_with_metrics(small, folder / "data")
    model = folder / "base"
    cut_model(base_model_folder(small), 2, model)
    sharpen(model / "model.safetensors")
    alone = {**ALONE, "gradient_accumulation_steps": 2}
    references = {
        dtype: ["", str(model), {**alone, "bf16": dtype == "bfloat16"}]
        for dtype in ("float32", "bfloat16")
    }
    (folder / "jobs.json").write_text(json.dumps(references))
    started = [*torchrun(1, "tests.backends.torch.planted_faults"), str(folder)]
    run(started, small.environment() | {RECORDS: "inf", TOGETHER: "1"})

    changed = {"RoPE has another base": {"rope_theta": 100.0}}
    changed["dropout is left on"] = {"attention_dropout": 0.1}
    settings = replace(small, **RUN, neuron_compile_cache_url=str(folder / "cache"))
    jobs = {}
    for name in ("as it should be", *FOUND):
        work = folder / name
        work.mkdir()
        one = replace(settings, seed=7) if name == "another seed" else settings
        model_of_job = with_config(model, work / "model", changed.get(name, {}))
        command = training_command(one, model_of_job, folder / "data", work, steps=STEPS)
        jobs[name] = [name, command[command.index("--base") :]]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = ["torchrun", "--nproc_per_node", "4", "-m", "tests.backends.neuron.planted_faults"]
    run([*command, str(folder)], environment(settings) | {"PATH": path(), RECORDS: "inf"})
    for name in jobs:
        write_record(folder / name, 4, 2)
    return folder


def sharpen(file: Path) -> None:
    """Make the attention depend on what and where tokens are, as a trained model's does. With small
    random queries and keys it is nearly uniform, whatever RoPE does."""
    weights = load_file(file)
    for name in weights:
        if "q_proj" in name or "k_proj" in name:
            weights[name] *= 4
    save_file(weights, file, metadata={"format": "pt"})


def run(command: list[str], more: dict[str, str]) -> None:
    env = clean_environment() | more | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def path() -> str:
    return f"{FAKES / 'commands'}:{os.environ['PATH']}"


def with_config(model: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """The model with other values in its config.json."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def found(folder: Path, name: str) -> list[Deviation]:
    names = ("float32", "bfloat16", name)
    return out_of_band(*(read_record(folder / one / "record.jsonl") for one in names))


def test_two_by_two_processes_are_in_the_band_of_one(rehearsed: Path) -> None:
    assert told(found(rehearsed, "as it should be")) == []
    record = read_record(rehearsed / "as it should be" / "record.jsonl")
    assert len(record) == 1 + STEPS and record[1]["gradients"]


@pytest.mark.parametrize("fault", FOUND)
def test_a_planted_fault_is_found_and_named(rehearsed: Path, fault: str) -> None:
    deviations = found(rehearsed, fault)
    step, word = FOUND[fault]
    assert deviations and deviations[0].step == step, deviations[:2]
    assert word in str(deviations[0])
