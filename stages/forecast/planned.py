"""What a stage's manifest says was planned, beside what was measured. Standard library only.

Arithmetic and manifests: nothing is traced here, so that no stage gets slower by it. A trace that
`make plan TRACE=1` left is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from stages.backends.schedule import sequences_per_step, total_steps
from stages.forecast.machine import Place, place_of
from stages.forecast.memory import training_memory
from stages.forecast.minutes import Estimate, stage_seconds, training_seconds
from stages.forecast.parameters import Shape, shape_of
from stages.forecast.traced import traced_bytes
from stages.model.fit import raw_config
from stages.model.size import bytes_written
from stages.run.layout import CONFIG_FILE, TRAIN_SPLIT
from stages.run.manifest import manifest_of
from stages.run.settings import Settings

QUANTITIES = ("seconds", "peak_memory_bytes", "bytes")


def config_here(settings: Settings) -> Path:
    """The folder of MODEL_ID's config.json on this machine: its own, or that in the Hub's cache,
    which may not exist."""
    folder = Path(settings.model_id)
    return folder if folder.is_dir() else _cached(settings.model_id, settings.model_revision)


def shape_here(settings: Settings) -> Shape | None:
    """The shape of MODEL_ID where its config.json is on this machine; else None."""
    try:
        return shape_of(raw_config(json.loads((config_here(settings) / CONFIG_FILE).read_bytes())))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _cached(model: str, revision: str) -> Path:
    """The folder of a Hub's model in huggingface_hub's cache, which may not exist; without the
    library, whose import takes longer than a plan."""
    home = os.environ.get("HF_HOME") or str(Path.home() / ".cache/huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")
    repository = hub / f"models--{model.replace('/', '--')}"
    try:
        commit = (repository / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = revision
    return repository / "snapshots" / commit


def rows_of(run_folder: Path) -> int | None:
    """The training sequences that the data stage published; None where it has not."""
    metrics = (manifest_of(run_folder / "data") or {}).get("metrics")
    split = metrics.get(TRAIN_SPLIT) if isinstance(metrics, dict) else None
    rows = split.get("rows") if isinstance(split, dict) else None
    return rows if isinstance(rows, int) and rows > 0 else None


def tokens_of(settings: Settings, run_folder: Path) -> int | None:
    """The tokens that train reads; None where they depend on data that are not published."""
    rows = rows_of(run_folder)
    if rows is None and settings.max_steps < 0:
        return None
    return total_steps(settings, rows or 0) * sequences_per_step(settings) * settings.max_length


def planned(stage: str, settings: Settings, run_folder: Path) -> dict[str, float | None]:
    """Seconds, peak memory of the largest rank and published bytes of `stage`; None for what is not
    known. A forecast that fails ends no stage."""
    try:
        return _planned(stage, settings, run_folder)
    except Exception as error:
        print(f"note: {stage} has no forecast: {type(error).__name__}: {error}", flush=True)
        return dict.fromkeys(QUANTITIES)


def _planned(stage: str, settings: Settings, run_folder: Path) -> dict[str, float | None]:
    here = replace(settings, instance="")  # a stage runs on this machine, whatever is planned for
    shape, place = shape_here(settings), place_of(here)
    memory = written = None
    if shape is not None:
        if stage in ("train", "precompile") and place.backend == "torch":
            traced = traced_bytes(settings, config_here(settings), place)
            memory = training_memory(shape, settings, place.device, traced).bytes
        written = bytes_written(settings, shape.parameters, place.backend).get(stage) or None
    if stage == "train":
        memory = by_precompile(run_folder).peak_memory or memory
    seconds = estimate(stage, settings, run_folder, place, shape, stale=()).seconds
    return {"seconds": seconds, "peak_memory_bytes": memory, "bytes": written}


def estimate(
    stage: str,
    settings: Settings,
    run_folder: Path,
    place: Place,
    shape: Shape | None,
    stale: Collection[str],
) -> Estimate:
    """How long `stage` takes. A stage that is not `stale` has the output of these settings."""
    if stage == "train":
        measured = by_precompile(run_folder).seconds
        if measured is not None and place.here and not {"data", "precompile"} & set(stale):
            return Estimate(measured, "as precompile measured its first steps in this run")
        known = "data" not in stale or settings.max_steps > 0
        tokens = tokens_of(settings, run_folder) if known else None
        return training_seconds(shape, settings, tokens, place, run_folder.parent)
    return stage_seconds(stage, run_folder.name, shape, place, run_folder.parent)


class ByPrecompile(NamedTuple):
    """What precompile measured of this run's training in its few steps: the seconds of all steps,
    and a rank's peak in bytes. None for what it did not."""

    seconds: float | None
    peak_memory: int | None


def by_precompile(run_folder: Path) -> ByPrecompile:
    """Holds where precompile is up to date, as it is before train."""
    metrics = (manifest_of(run_folder / "precompile") or {}).get("metrics")
    known = metrics if isinstance(metrics, dict) else {}
    return ByPrecompile(known.get("train_seconds_expected"), known.get("peak_memory_bytes"))


def compared(plan: dict[str, float | None], measured: dict[str, Any]) -> dict[str, Any]:
    """A manifest's entry "forecast"."""
    return {
        name: {"planned": plan.get(name), "measured": measured.get(name)} for name in QUANTITIES
    }
