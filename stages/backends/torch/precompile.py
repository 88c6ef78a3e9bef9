"""Runs the training command for a few steps, to compile train's kernels and measure a step.

Without TORCH_COMPILE there is nothing to compile, and the steps are only a rehearsal: the model
loads, fits in memory and learns, and the time of a step gives an estimate for the training.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from statistics import median

from stages.backends.schedule import sequences_per_step, total_steps
from stages.backends.torch.train import device_name, environment, prepare, training_command
from stages.model.base import base_model_folder
from stages.model.size import training_bytes
from stages.run.disk import disk_guard
from stages.run.json_file import write_json
from stages.run.launch import launch
from stages.run.layout import METRICS_FILE, PRECOMPILE_FILE
from stages.run.progress import duration
from stages.run.publish import StageResult
from stages.run.settings import Settings

STEPS = 4


def precompile(settings: Settings, data: Path, work: Path) -> StageResult:
    """Run STEPS steps in a temporary folder inside `work`.

    Writes precompile.json: what was cached and measured.
    """
    sequences = prepare(settings, data)
    before = _cached_files(settings)
    rehearsal = work / "rehearsal"
    shutil.rmtree(rehearsal, ignore_errors=True)
    rehearsal.mkdir()
    started = time.monotonic()
    try:
        command = training_command(
            settings, base_model_folder(settings), data, rehearsal, max_steps=STEPS
        )
        with disk_guard(
            "the rehearsal's shards", rehearsal, training_bytes(settings, "torch", steps=1)
        ):
            launch(
                command,
                {**environment(settings), "LOGGING_STEPS": "1", "EVAL_STEPS": "0"},
                rehearsal / "error",
            )
        lines = [
            json.loads(line)
            for line in (rehearsal / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        ]
    finally:
        shutil.rmtree(rehearsal)
    cached = _cached_files(settings)
    tokens = sequences_per_step(settings) * settings.max_length
    each = [tokens / line["tokens_per_second"] for line in lines]
    seconds, steps = median(each[1:]), total_steps(settings, sequences)
    # Loading and saving the model; whatever is compiled is in the first step.
    around = max(0.0, time.monotonic() - started - sum(each))
    expected = steps * seconds + around
    print(
        f"a step takes {seconds:.3g} s after the first, what is around them {duration(around)}: "
        f"{steps:,} steps take about {duration(expected)}",
        flush=True,
    )
    report = {
        "compile_cache_files": len(cached),
        "compile_cache_files_new": len(cached - before),
        "seconds_per_step": round(seconds, 4),
        "train_seconds_expected": round(expected, 1),
        "peak_memory_bytes": lines[-1].get("peak_memory_bytes"),
    }
    write_json(work / PRECOMPILE_FILE, report)
    return StageResult(device=device_name(settings), metrics=report, unkeyed=(PRECOMPILE_FILE,))


def _cached_files(settings: Settings) -> set[Path]:
    from stages.backends.device import device_of

    device = device_of(settings)
    return {path for path in device.cache.rglob(device.cached) if path.is_file()}
