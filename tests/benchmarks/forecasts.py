"""Memory and time of trainings on this machine's CPU against what `make plan` says beforehand, and
published memory of others against the same arithmetic.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/forecasts.py WORK_FOLDER > table.md

Each row trains a random model for STEPS steps with the real worker and reads the peak of its
largest rank. Results in WORK_FOLDER are used again.
The published points need no hardware.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click

from stages.backends.schedule import sequences_per_step
from stages.forecast.machine import place_of
from stages.forecast.memory import layer_bytes, training_memory
from stages.forecast.minutes import fixed_seconds
from stages.forecast.parameters import Shape, shape_of
from stages.model.fit import raw_config
from stages.run.settings import Settings

STEPS = 4
GIB = 2**30
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
    ("59M", {"max_length": 1024}),
    ("59M", {"max_length": 256, "bf16": False}),
    ("94M", {"max_length": 256, "nproc_per_node": 2}),
    ("94M", {"max_length": 512, "nproc_per_node": 2, "tensor_parallel_size": 2}),
    ("135M", {"max_length": 512, "lora_r": 16}),
    ("94M", {"max_length": 512, "gradient_accumulation_steps": 2}),
    ("22M", {"max_length": 512, "per_device_train_batch_size": 2, "bf16": False}),
    ("59M", {"max_length": 512, "per_device_train_batch_size": 2, "lora_r": 16}),
    ("59M", {"max_length": 1024, "gradient_checkpointing": True}),
    ("94M", {"max_length": 256, "nproc_per_node": 2, "bf16": False}),
    ("135M", {"max_length": 256, "nproc_per_node": 2}),
    *(
        ("135M", {"max_length": 512, "per_device_train_batch_size": size, **more})
        for size, more in ((2, {"gradient_accumulation_steps": 2}), (4, {}))
    ),
]
# Measured once after the constants of stages/forecast/memory.py were chosen, with RUNS in view.
HELD_OUT: list[tuple[str, dict[str, Any]]] = [
    ("22M", {"max_length": 1024, "per_device_train_batch_size": 2, "lora_r": 8}),
    ("59M", {"max_length": 512, "per_device_train_batch_size": 2, "bf16": False}),
    ("94M", {"max_length": 1024}),
    ("135M", {"max_length": 512, "nproc_per_node": 2}),
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
    result = work / f"{label_of(name, changes).replace(' ', ',')}.json"
    if not result.exists():
        settings = settings_of(changes)
        run = work / "run"
        trained(name, settings, work, run).check_returncode()
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        tokens = sequences_per_step(settings) * settings.max_length
        seconds = median(tokens / line["tokens_per_second"] for line in lines[1:])
        result.write_text(
            json.dumps({"peak": lines[-1]["peak_memory_bytes"], "step": round(seconds, 3)})
        )
    return json.loads(result.read_text())


def settings_of(changes: dict[str, Any]) -> Settings:
    base = Settings(device="cpu", backend="torch", logging_steps=1, eval_steps=0)
    return replace(base, **changes)


def trained(
    name: str, settings: Settings, work: Path, run: Path, under: Sequence[str] = ()
) -> subprocess.CompletedProcess[bytes]:
    """STEPS steps of a model of MODELS in the folder `run`, which is made anew, started by the
    command `under`."""
    from stages.backends.torch.train import environment, training_command

    base, rows = model_folder(name, work), rows_folder(settings.max_length, work)
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    command = training_command(settings, base, rows, run, STEPS)
    return subprocess.run(
        [*under, *command],
        env={**os.environ, **environment(settings)},
        stdout=subprocess.DEVNULL,
    )


def shape(name: str) -> Shape:
    hidden, layers, inner, heads, key_value, vocabulary, tied = MODELS[name]
    return llama(hidden, layers, inner, heads, key_value, vocabulary, tied)


def llama(
    hidden: int, layers: int, inner: int, heads: int, key_value: int, vocabulary: int, tied: bool
) -> Shape:
    values = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    found = shape_of(raw_config(values))
    assert found is not None
    return found


def own_rows(
    runs: list[tuple[str, dict[str, Any]]], work: Path, calibrated: dict[Any, float]
) -> Iterator[str]:
    """A line for each of `runs`: memory planned and measured, and a step's time scaled from the
    first run of the same model, precision, checkpointing and processes: its FLOP per second is
    kept in `calibrated`."""
    yield "| Run | Measured | Planned | Off | Step | Scaled | Off |"
    yield "|---|---|---|---|---|---|---|"
    off, off_time = [], []
    here = place_of(Settings(device="cpu", backend="torch"))
    for name, changes in runs:
        result = measured(name, changes, work)
        settings = settings_of(changes)
        planned = training_memory(shape(name), settings, "cpu").bytes
        off.append(planned / result["peak"] - 1)
        flop = shape(name).flop_per_token(settings.max_length, not settings.lora_r)
        flop *= settings.max_length * sequences_per_step(settings)
        fixed = fixed_seconds(shape(name), settings, here)
        likeness = (name, settings.bf16, settings.gradient_checkpointing, settings.nproc_per_node)
        likeness += (bool(settings.lora_r), settings.tensor_parallel_size)  # type: ignore[assignment]
        scaled = "calibrates |"
        if likeness in calibrated:
            seconds = fixed + flop / calibrated[likeness]
            off_time.append(seconds / result["step"] - 1)
            scaled = f"{seconds:.2f} s | {off_time[-1]:+.0%}"
        else:
            calibrated[likeness] = flop / (result["step"] - fixed)
        yield (
            f"| {label_of(name, changes)} | {result['peak'] / 1e6:,.0f} MB | "
            f"{planned / 1e6:,.0f} MB | {off[-1]:+.1%} | {result['step']:.2f} s | {scaled} |"
        )
    for what, errors in (("memory", off), ("time", off_time)):
        sizes = [abs(error) for error in errors]
        yield (
            f"\n{len(sizes)} {what} forecasts: mean {sum(sizes) / len(sizes):.1%}, worst "
            f"{max(sizes):.1%}, {sum(size <= 0.05 for size in sizes)} within 5%, "
            f"{sum(size <= 0.15 for size in sizes)} within 15%."
        )


def published_rows() -> Iterator[str]:
    """Others' memory (GB = 10^9 bytes) beside our parts, with the states that their settings have.

    Only what their settings share with ours can be compared: a layer's activations, the logits, the
    states a parameter.
    """
    three = llama(3072, 28, 8192, 24, 8, 128256, True)
    seven = llama(4096, 32, 11008, 32, 32, 32000, False)
    run = Settings(per_device_train_batch_size=2, max_length=4096)
    tokens = 2 * 4096
    layers = tokens * 28 * layer_bytes(three, run, packed=False)
    logits = 12 * tokens * three.vocabulary
    kept = tokens * 28 * 2 * three.hidden + tokens * layer_bytes(three, run, packed=False)
    states = 8 * three.parameters  # weights, gradients and two moments, all bfloat16
    lora = replace(run, lora_r=8, lora_target_modules="q_proj v_proj")
    row = layer_bytes(seven, lora, packed=False) * 32 * 1304 + 12 * 1304 * seven.vocabulary
    points = [
        ("torchtune, Llama 3.2 3B full, packed 2 x 4,096", 60.0 * GIB, states + layers + logits),
        ("torchtune, the same, + chunked loss, compiled", 42.9 * GIB, states + layers),
        ("torchtune, the same, + checkpointing", 24.9 * GIB, states + kept),
        ("Qwen, 7B full, ZeRO-3, both A100, 256 tokens", 139.2e9, 18 * 7_721_324_544),
        ("litgpt, Llama 2 7B LoRA: a sequence of 1,304 more", 7.77e9, row),
    ]
    yield "| Published | Their figure | Our parts | Off |"
    yield "|---|---|---|---|"
    for what, theirs, ours in points:
        sizes = f"{theirs / 1e9:,.1f} GB | {ours / 1e9:,.1f} GB"
        yield f"| {what} | {sizes} | {ours / theirs - 1:+.1%} |"


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
def main(work: Path) -> None:
    work.mkdir(exist_ok=True, parents=True)
    calibrated: dict[Any, float] = {}
    tables = {
        "Constants chosen with these in view": own_rows(RUNS, work.absolute(), calibrated),
        "Held out": own_rows(HELD_OUT, work.absolute(), calibrated),
        "Published by others": published_rows(),
    }
    for title, lines in tables.items():
        print(f"\n## {title}\n", *lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
