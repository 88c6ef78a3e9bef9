"""The training command for a few steps, so that train finds its kernels compiled and one knows what a step costs.

Without TORCH_COMPILE there is nothing to compile; the few steps are then a rehearsal: the model loads, it fits, it
learns, and the time of a step foretells the training's.
"""

from __future__ import annotations

import json
import shutil
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
    """Run STEPS steps in a throw-away folder below `work`; leaves precompile.json, what was cached and measured."""
    rows = prepare(settings, data)
    before = _cached()
    throw_away = work / "throw-away"
    shutil.rmtree(throw_away, ignore_errors=True)
    throw_away.mkdir()
    try:
        command = training_command(
            settings, base_model_folder(settings), data, throw_away, max_steps=STEPS
        )
        with disk_guard(
            "the rehearsal's shards", throw_away, training_bytes(settings, "torch", steps=1)
        ):
            launch(
                command,
                {**environment(settings), "LOGGING_STEPS": "1", "EVAL_STEPS": "0"},
                throw_away / "error",
            )
        lines = [
            json.loads(line)
            for line in (throw_away / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        ]
    finally:
        shutil.rmtree(throw_away)
    cached = _cached()
    seconds = median(
        sequences_per_step(settings) * settings.max_length / line["tokens_per_second"]
        for line in lines[1:]
    )
    steps = total_steps(settings, rows)
    print(
        f"a step takes {seconds:.3g} s after the first: {steps:,} steps about {duration(steps * seconds)}",
        flush=True,
    )
    report = {
        "compile_cache_files": len(cached),
        "compile_cache_files_new": len(cached - before),
        "seconds_per_step": round(seconds, 4),
        "train_seconds_expected": round(seconds * steps, 1),
    }
    write_json(work / PRECOMPILE_FILE, report)
    return StageResult(device=device_name(), metrics=report, unkeyed=(PRECOMPILE_FILE,))


def _cached() -> set[Path]:
    from stages.backends.torch.inductor import COMPILE_CACHE

    return {path for path in COMPILE_CACHE.rglob("*") if path.is_file()}
