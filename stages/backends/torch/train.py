"""Training with PyTorch: checks what cannot run, then starts the workers with torchrun.

precompile starts the same workers with the same command; `training_command` builds both.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from stages.backends.metrics import last_line
from stages.backends.schedule import derivation, sequences_per_step, total_steps
from stages.backends.torch.check import training_problems
from stages.model.base import base_config, base_model_folder, copy_config
from stages.model.size import training_bytes
from stages.run import allocator
from stages.run.digests import files_below
from stages.run.disk import disk_guard
from stages.run.errors import InputError, refuse
from stages.run.launch import launch
from stages.run.layout import CHECKPOINTS_FOLDER, MANIFEST_FILE, METRICS_FILE, SHARDS_FOLDER
from stages.run.publish import StageResult
from stages.run.settings import Settings


def train(settings: Settings, data: Path, precompiled: Path, work: Path) -> StageResult:
    """Train on the rows in `data`; leaves shards, metrics.jsonl, config, tokenizer and prompt in
    `work`.

    `precompiled`: what precompile published; inductor looks in its cache by itself.
    """
    rows = prepare(settings, data)
    base = base_model_folder(settings)
    if not (
        work / SHARDS_FOLDER
    ).is_dir():  # else a former call trained to the end and was killed before it published
        _remove_half_written(work)  # of a training that was killed
        kept = sum(file.stat().st_size for file in files_below(work / CHECKPOINTS_FOLDER))
        needed = training_bytes(settings, "torch", total_steps(settings, rows)) - kept
        try:
            with disk_guard("the training's checkpoints and shards", work, max(0, needed)):
                launch(
                    training_command(settings, base, data, work, max_steps=-1),
                    environment(settings),
                    work / "error",
                )
        finally:
            _remove_half_written(work)
    shutil.rmtree(work / CHECKPOINTS_FOLDER, ignore_errors=True)
    copy_config(base, data, work)
    steps = total_steps(settings, rows)
    last = last_line(work / METRICS_FILE)
    tokens = steps * settings.max_length * sequences_per_step(settings)
    return StageResult(
        device=device_name(settings), tokens=tokens, metrics=last, unkeyed=(METRICS_FILE,)
    )


def _remove_half_written(work: Path) -> None:
    for folder in (*work.glob("*.writing"), *(work / CHECKPOINTS_FOLDER).glob("*.writing")):
        shutil.rmtree(folder, ignore_errors=True)


def prepare(settings: Settings, data: Path) -> int:
    """Check that the training can run, print what follows from the settings; returns the number of
    training rows."""
    figures = json.loads((data / MANIFEST_FILE).read_bytes())["metrics"]
    config = base_config(settings)
    refuse(
        [*training_problems(settings, config, figures["vocabulary"]), *device_problems(settings)]
    )
    rows = figures["train"]["rows"]
    device = device_name(settings)
    lines = [f"device           {device}"]
    if device.startswith("cpu") and (advice := allocator.advice()):
        lines.append(f"allocator        {advice}")
    print("\n".join([*lines, *derivation(settings, rows)]), flush=True)
    return rows


def training_command(
    settings: Settings, base: Path, data: Path, work: Path, max_steps: int
) -> list[str]:
    """torchrun and the worker, as train and precompile run them; only `work` and `max_steps`
    differ."""
    launcher = [
        "-m",
        "stages.backends.torch.torchrun",
        "--standalone",
        "--nproc-per-node",
        str(settings.nproc_per_node),
    ]
    worker = ["-m", "stages.backends.torch.worker", "--base", str(base), "--data", str(data)]
    return [sys.executable, *launcher, *worker, "--work", str(work), "--max-steps", str(max_steps)]


def environment(settings: Settings) -> dict[str, str]:
    """What the workers get besides the caller's environment."""
    from stages.backends.device import device_of

    threads = max(1, (os.cpu_count() or 1) // settings.nproc_per_node)
    return {
        **settings.environment(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        **device_of(settings).environment(),
        # torchrun repeats a worker's failure at ERROR.
        "LOGLEVEL": os.environ.get("LOGLEVEL", "CRITICAL"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def device_problems(settings: Settings) -> Iterator[str]:
    """What torch knows of this machine that keeps it from training with these settings."""
    from stages.backends.device import device_of
    from stages.backends.torch.inductor import unusable_path

    try:
        device = device_of(settings)
    except InputError as error:
        yield from error.problems
        return
    if settings.torch_compile and (path := unusable_path()):
        yield (
            f"TORCH_COMPILE=1: inductor cannot use a path with a space ({path}). Move the project, "
            "or leave it 0."
        )
    ranks = device.ranks()
    if ranks is not None and settings.nproc_per_node > ranks:
        yield (
            f"NPROC_PER_NODE={settings.nproc_per_node} is above the {ranks} that can train here "
            f"({device.describe()}). Lower it."
        )


def device_name(settings: Settings) -> str:
    """What does the work, for the manifest: the GPU's name, or the CPU."""
    from stages.backends.device import device_of

    return device_of(settings).describe()
