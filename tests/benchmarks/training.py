"""The speed of training, beside transformers' Trainer on the same rows and settings.

    export RECIPE=smollm2-135m
    make data
    PYTHONPATH=. .venv/bin/python tests/benchmarks/training.py outputs/smollm2-135m [--steps 10]

Settings come from the environment and the recipe, as for a stage. Each way is a process of its own,
one after the other: this project eager and compiled, in NPROC_PER_NODE processes, and Trainer with
the same global batch in one, in float32 and bfloat16, eager and compiled. A row: tokens per second
(the median after the third step), seconds of the first step (compiling is in it), peak memory of a
process. The ceiling is what the matrix products of a step take at the speed of the fastest here.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click

from stages.run.settings import Settings
from tests.benchmarks.trainer import trainer_of

WAYS: dict[str, dict[str, Any]] = {
    "here": {},
    "here, compiled": {"TORCH_COMPILE": "1"},
    "Trainer, float32": {"bf16": False},
    "Trainer, float32, compiled": {"bf16": False, "torch_compile": True},
    "Trainer, bfloat16": {"bf16": True},
    "Trainer, bfloat16, compiled": {"bf16": True, "torch_compile": True},
}
WARM = 3  # steps that are not counted


def here(settings: Settings, data: Path, work: Path, steps: int) -> dict[str, float]:
    """This project's training, as precompile runs it."""
    from stages.backends.torch.train import environment, training_command
    from stages.model.base import base_model_folder
    from stages.run.launch import launch

    command = training_command(settings, base_model_folder(settings), data, work, steps)
    launch(
        command,
        {**environment(settings), "LOGGING_STEPS": "1", "EVAL_STEPS": "0", "SAVE_STEPS": "0"},
        work / "error",
    )
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines]
    tokens = tokens_of(settings)
    return row(tokens, [tokens / rate for rate in rates], lines[-1]["peak_memory_bytes"])


def trainer(
    settings: Settings, data: Path, work: Path, steps: int, more: dict[str, Any]
) -> dict[str, float]:
    """Trainer in this process."""
    from transformers import TrainerCallback

    from stages.backends.schedule import data_parallel_size

    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    batch = settings.per_device_train_batch_size * data_parallel_size(settings)
    more = {**more, "per_device_train_batch_size": batch, "max_steps": steps, "disable_tqdm": True}
    made = trainer_of(settings, data, work, **more)
    made.add_callback(Clock())
    made.train()
    seconds = [end - start for start, end in zip(times[::2], times[1::2], strict=True)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row(tokens_of(settings), seconds, peak)


def tokens_of(settings: Settings) -> int:
    """Tokens of a step."""
    from stages.backends.schedule import sequences_per_step

    return sequences_per_step(settings) * settings.max_length


def row(tokens: int, seconds: list[float], peak: float) -> dict[str, float]:
    each = median(seconds[WARM:])
    return {"tokens_per_second": tokens / each, "first": seconds[0], "peak": peak}


def fastest_product() -> float:
    """FLOP/s of the fastest bfloat16 matrix product of the sizes that models have."""
    import torch

    found = 0.0
    for m, k, n in ((2048, 576, 1536), (1024, 256, 688), (2048, 2048, 2048)):
        a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
        times = []
        for _ in range(20):
            started = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - started)
        found = max(found, 2 * m * k * n / min(times))
    return found


def ceiling(settings: Settings, data: Path) -> float:
    """Tokens per second if nothing but the matrix products of weights took time: forward, and for
    the weights that are trained twice as much backward. The head counts supervised tokens alone."""
    from stages.forecast.parameters import shape_of, trainable
    from stages.model.base import base_config

    shape = shape_of(base_config(settings))
    counted = json.loads((data / "manifest.json").read_text())["metrics"]["train"]
    share = counted["supervised"] / (counted["rows"] * settings.max_length)
    layers = shape.layers * shape.layer
    products = layers + share * shape.embedding
    passes = 4 * products + 2 * (trainable(shape, settings) if settings.lora_r else products)
    return fastest_product() / passes


def measure(way: str, data: Path, steps: int) -> dict[str, float]:
    """One way in this process."""
    settings = Settings.read()
    with tempfile.TemporaryDirectory() as work:
        if way.startswith("here"):
            return here(settings, data, Path(work), steps)
        return trainer(settings, data, Path(work), steps, WAYS[way])


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--steps", default=10, show_default=True)
@click.option("--way", hidden=True)
def main(run: Path, steps: int, way: str | None) -> None:
    if way:
        print(json.dumps(measure(way, run / "data", steps)))
        return
    rows = {}
    for name, more in WAYS.items():
        environment = {**os.environ, **(more if name.startswith("here") else {})}
        done = subprocess.run(
            [sys.executable, __file__, str(run), "--steps", str(steps), "--way", name],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows[name] = json.loads(done.stdout.splitlines()[-1])
    print("| | tokens/s | first step, s | peak memory, GB |\n|---|---|---|---|")
    for name, one in rows.items():
        print(
            f"| {name} | {one['tokens_per_second']:,.0f} | {one['first']:.1f} | "
            f"{one['peak'] / 1e9:.2f} |"
        )
    best = max(one["tokens_per_second"] for name, one in rows.items() if "Trainer" in name)
    ours = max(one["tokens_per_second"] for name, one in rows.items() if "here" in name)
    most = ceiling(Settings.read(), run / "data")
    print(
        f"\n{ours / best:.2f} x the best of Trainer's; the ceiling is {most:,.0f} tokens/s, of "
        f"which this is {ours / most:.0%}."
    )


if __name__ == "__main__":
    main()
