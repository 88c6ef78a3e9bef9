"""Rehearsals of trainings with nothing wrong: how many are out of band, and how near others come.

    PYTHONPATH=. python tests/benchmarks/rehearsals.py [--seeds 4]

Each tiny model is trained with each seed by one process in float32 and in bfloat16, and by two
data-parallel by two tensor-parallel processes in bfloat16. "of the band" is the largest deviation
as a fraction of what is allowed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from stages.backends import band
from stages.data import pack
from stages.rehearse import ALONE
from stages.run.settings import Settings
from tests.conftest import ROOT, copy_project, torchrun
from tests.tiny_models import tiny_model

MODELS = ("llama", "mistral", "qwen3", "granite", "gemma3_text")
STEPS = 5


def nearest(reference: list[Any], rounded: list[Any], run: list[Any]) -> float:
    """The largest deviation of all steps, as a fraction of what is allowed."""
    noise = band._noise(reference, rounded)
    return max(
        deviation / allowed
        for number, (expected, found) in enumerate(zip(reference, run, strict=True))
        for _, deviation, allowed in band._deviations(number, expected, found, noise)
    )


@click.command()
@click.option("--seeds", default=4, show_default=True, help="Seeds of each model.")
def main(seeds: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny = copy_project(folder / "project").folder / "data" / "tiny"
        settings = Settings(
            model_id=str(tiny),
            dataset=str(tiny / "rows.jsonl"),
            max_length=128,
            inference_sequence_length=64,
            max_steps=STEPS,
            learning_rate=3e-3,
            bf16=False,
            save_steps=0,
            eval_steps=0,
        )
        facts = pack(settings, folder / "data")
        (folder / "data/manifest.json").write_text(json.dumps({"metrics": facts.metrics}))
        for model in MODELS:
            vocabulary = facts.metrics["vocabulary"]
            tiny_model(model, vocab_size=vocabulary).save_pretrained(folder / model)
        runs = [(model, seed) for model in MODELS for seed in range(1, 1 + seeds)]
        train(folder, settings, runs)
        out = 0
        for model, seed in runs:
            records = [
                band.read_record(folder / f"{model} {seed} {name}" / "record.jsonl")
                for name in ("float32", "bfloat16", "run")
            ]
            found = band.out_of_band(*records)
            out += bool(found)
            what = band.told(found) or [f"{nearest(*records):.2f} of the band"]
            print(f"{model:12} seed {seed}: {'; '.join(what)}")
        print(f"{out} of {len(runs)} are out of band")
        sys.exit(bool(out))


def train(folder: Path, settings: Settings, runs: list[tuple[str, int]]) -> None:
    """Leave record.jsonl of each training in a folder of its name."""
    divided = {"nproc_per_node": 4, "tensor_parallel_size": 2}
    for processes, names in ((1, ("float32", "bfloat16")), (4, ("run",))):
        layout = {**ALONE, "gradient_accumulation_steps": 2} if processes == 1 else divided
        jobs = {
            f"{model} {seed} {name}": [
                "",
                model,
                {**layout, "seed": seed, "bf16": name != "float32"},
            ]
            for model, seed in runs
            for name in names
        }
        (folder / "jobs.json").write_text(json.dumps(jobs))
        subprocess.run(
            [*torchrun(processes, "tests.backends.torch.planted_faults"), str(folder)],
            cwd=ROOT,
            env={**os.environ, **settings.environment(), "OMP_NUM_THREADS": "1"},
            check=True,
        )


if __name__ == "__main__":
    main()
