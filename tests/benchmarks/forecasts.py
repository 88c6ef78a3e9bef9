"""Memory and time of trainings on this machine's CPU against what `make plan` says beforehand, and
published memory of others against the same arithmetic.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/forecasts.py WORK_FOLDER > table.md

Each row trains a random model for STEPS steps with the real worker, reads the peak of its rank, and
compares it with the traced step and with the arithmetic. Results in WORK_FOLDER are used again.
The published points need no hardware.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click

from stages.backends.schedule import sequences_per_step
from stages.run.settings import Settings

STEPS = 4
# Name -> width, layers, intermediate width, heads, key-value heads, vocabulary, tied.
MODELS = {
    "22M": (384, 8, 1024, 6, 6, 16000, True),
    "59M": (512, 12, 1408, 8, 4, 32000, False),
    "94M": (768, 10, 2048, 12, 4, 32000, True),
    "135M": (576, 30, 1536, 9, 3, 49152, True),
}
# Model and the settings that differ from one process, bfloat16, no accumulation.
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("22M", {"max_length": 256}),
    ("22M", {"max_length": 256, "bf16": False}),
    ("22M", {"max_length": 512, "per_device_train_batch_size": 2}),
    ("22M", {"max_length": 1024, "per_device_train_batch_size": 2}),
    ("22M", {"max_length": 256, "nproc_per_node": 2}),
    ("22M", {"max_length": 256, "nproc_per_node": 2, "tensor_parallel_size": 2}),
    ("59M", {"max_length": 256}),
    ("59M", {"max_length": 512, "gradient_checkpointing": True}),
    ("59M", {"max_length": 256, "lora_r": 8}),
    ("59M", {"max_length": 256, "gradient_accumulation_steps": 2}),
    ("59M", {"max_length": 256, "nproc_per_node": 2}),
    ("59M", {"max_length": 256, "nproc_per_node": 2, "tensor_parallel_size": 2}),
    ("94M", {"max_length": 256}),
    ("94M", {"max_length": 256, "bf16": False}),
    ("94M", {"max_length": 512, "per_device_train_batch_size": 2, "gradient_checkpointing": True}),
    ("94M", {"max_length": 512, "lora_r": 16}),
    ("135M", {"max_length": 256}),
    ("135M", {"max_length": 256, "gradient_checkpointing": True}),
]


def model_folder(name: str, work: Path) -> Path:
    """A random model of MODELS, written once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = work / name
    if not (folder / "model.safetensors").exists():
        hidden, layers, inner, heads, key_value, vocabulary, tied = MODELS[name]
        config = LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=key_value,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
            max_position_embeddings=4096,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows_folder(length: int, work: Path) -> Path:
    """Packed sequences of random ids, a document each, written once."""
    import numpy as np
    from datasets import Dataset

    folder = work / f"rows-{length}"
    if not folder.exists():
        ids = np.random.default_rng(0).integers(0, 16000, (16, length), dtype=np.int32)
        positions = np.tile(np.arange(length, dtype=np.int32), (16, 1))
        columns = {"input_ids": ids, "labels": ids, "position_ids": positions}
        table = {name: list(values) for name, values in columns.items()}
        Dataset.from_dict(table).save_to_disk(str(folder / "train"))
    return folder


def label_of(name: str, changes: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key.upper()}={int(value)}" for key, value in changes.items())])


def measured(name: str, changes: dict[str, Any], work: Path) -> dict[str, Any]:
    """The peak bytes and the seconds of a step of one run, from the real worker."""
    from stages.backends.torch.train import environment, training_command

    result = work / f"{label_of(name, changes).replace(' ', ',')}.json"
    if not result.exists():
        settings = replace(
            Settings(device="cpu", backend="torch", logging_steps=1, eval_steps=0), **changes
        )
        base, rows, run = (
            model_folder(name, work),
            rows_folder(settings.max_length, work),
            work / "run",
        )
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        command = training_command(settings, base, rows, run, STEPS)
        subprocess.run(
            command,
            env={**os.environ, **environment(settings)},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        tokens = sequences_per_step(settings) * settings.max_length
        seconds = median(tokens / line["tokens_per_second"] for line in lines[1:])
        result.write_text(
            json.dumps({"peak": lines[-1]["peak_memory_bytes"], "step": round(seconds, 3)})
        )
        shutil.rmtree(run)
    return json.loads(result.read_text())


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
def main(work: Path) -> None:
    work.mkdir(exist_ok=True, parents=True)
    for name, changes in RUNS:
        print(label_of(name, changes), measured(name, changes, work.absolute()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
