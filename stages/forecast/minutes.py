"""How long a stage takes: from this machine's own manifests, else from utilisations that others
measured, else unknown. Standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from stages.backends.schedule import sequences_per_step
from stages.forecast.machine import Place
from stages.forecast.parameters import Shape, shape_of, trainable
from stages.make.results import runs_of
from stages.model.fit import raw_config
from stages.run.layout import CONFIG_FILE
from stages.run.manifest import manifest_of
from stages.run.settings import Settings

# Model FLOP utilisation in bfloat16 that others measured: device -> share of the peak, source, and
# what else was reached there. None of it was measured with this project.
UTILISATIONS = {
    "Trainium": (
        *(0.071, "Hugging Face's tutorial: Llama 2 7B on a trn1.32xlarge, TP 8, checkpointing"),
        "AWS pre-trains Llama 2 7B at 0.38 to 0.40 on 16 of them",
    ),
    "A100-40": (0.509, "llm-foundry: MPT-7B on 8, 2,048, checkpointing", "nothing else known"),
    "A100-80": (0.642, "llm-foundry: MPT-7B on 8, 2,048", "nothing else known"),
    "H100": (
        *(0.464, "llm-foundry: MPT-7B on 8, 2,048"),
        "torchtitan trains Llama 3.1 8B at 0.33 to 0.39",
    ),
}
# Parameters of the models that those utilisations may be taken for: they are of 7B and 8B. A small
# one does not fill a device.
LEAST, MOST = 3 * 10**9, 20 * 10**9
# A consolidation that writes less than these bytes shows how long a process takes to start.
LEAST_WRITTEN = 10**9
# What a step's arithmetic follows from, and what its speed does beside it.
_LIKENESS = {"BF16", "NPROC_PER_NODE", "GRADIENT_CHECKPOINTING", "TORCH_COMPILE"}
_LIKENESS |= {"TENSOR_PARALLEL_SIZE", "PIPELINE_PARALLEL_SIZE"}
_OF_A_STEP = _LIKENESS | {"MAX_LENGTH", "LORA_R", "LORA_TARGET_MODULES"}
_OF_A_STEP |= {"PER_DEVICE_TRAIN_BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS"}
# Fixed seconds of a step: tests/benchmarks/results/2026-11-29-forecasts.md.
_PER_PARAMETER, _PER_LAYER = 4e-9, 4e-3
# Stages whose time grows with the model, the others' with the data: the model's size, and how much
# of it takes as long on a CPU as starting does (tests/benchmarks/results/2026-11-29-decode.md).
_SIZES: dict[str, tuple[Callable[[Shape], int], float]] = {
    "consolidate": (lambda shape: shape.parameters, 2.8e9),
    "compile-inference": (lambda shape: shape.layers, 22),
}


@dataclass(frozen=True)
class Estimate:
    """Seconds, None where unknown, and where they come from."""

    seconds: float | None
    basis: str


@dataclass(frozen=True)
class Past:
    """A stage that ran on this machine: its run's name, its manifest, and its model's shape."""

    run: str
    manifest: dict[str, Any]
    shape: Shape | None


def past_of(stage: str, outputs: Path, place: Place) -> list[Past]:
    """What `stage` published below `outputs` on the device of `place`, the latest first."""
    found = []
    for run in runs_of(outputs, [stage]):
        manifest = manifest_of(run / stage)
        if manifest is None or not _is_number(manifest.get("seconds")):
            continue
        same = str(manifest.get("device", "")).startswith("cpu") == (place.device == "cpu")
        if same or stage in ("data", "consolidate"):
            found.append(Past(run.name, manifest, _shape_of(run)))
    return sorted(found, key=lambda past: str(past.manifest.get("finished")), reverse=True)


def _shape_of(run: Path) -> Shape | None:
    """The shape of the model in a run's folder."""
    for name in ("train", "consolidate"):
        try:
            return shape_of(raw_config(json.loads((run / name / CONFIG_FILE).read_bytes())))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            continue
    return None


def training_seconds(
    shape: Shape | None, settings: Settings, tokens: int | None, place: Place, outputs: Path
) -> Estimate:
    """How long train takes for `tokens` on `place`."""
    if tokens is None or shape is None:
        what = "the number of tokens" if shape else "the shape of the model"
        return Estimate(None, f"{what} is not known yet")
    flop = tokens * shape.flop_per_token(settings.max_length, not settings.lora_r)
    if place.here:
        likest = _likest(settings, place, outputs, shape)
        if likest is not None:
            rate, start, run = likest
            steps = tokens / (sequences_per_step(settings) * settings.max_length)
            seconds = start + flop / rate + steps * fixed_seconds(shape, settings, place)
            return Estimate(seconds, f"measured on this machine in run {run}")
    if place.machine is None or place.machine.device not in UTILISATIONS:
        device = place.machine.device if place.machine else place.device
        return Estimate(None, f"no run here, and no utilisation of {device} is known")
    if not LEAST <= shape.parameters <= MOST:
        return Estimate(None, f"no utilisation by a model of {shape.parameters:,} is known")
    share, source, _ = UTILISATIONS[place.machine.device]
    cores = place.machine.cores
    used = min(settings.nproc_per_node, cores)
    rate = share * place.machine.peak * 1e12 * place.machine.devices * used / cores
    of = f"{share:.1%} of the peak of {used} of {cores} cores"
    return Estimate(flop / rate, f"{of}, measured elsewhere ({source})")


def _likest(
    settings: Settings, place: Place, outputs: Path, shape: Shape
) -> tuple[float, float, str] | None:
    """FLOP per second of a step beside its fixed seconds, seconds beside the steps, and the run: of
    the likest run, the latest of equals."""
    rates = []
    for past in past_of("train", outputs, place):
        made = past.manifest["provenance"]["settings"]
        metrics, tokens = past.manifest.get("metrics"), past.manifest.get("tokens")
        speed = metrics.get("tokens_per_second") if isinstance(metrics, dict) else None
        if past.shape is None or not (_is_number(speed) and _is_number(tokens)):
            continue
        then = replace(settings, **{name.lower(): made[name] for name in _OF_A_STEP & made.keys()})
        apart = abs(math.log(past.shape.parameters / shape.parameters))
        apart += sum(
            getattr(then, name.lower()) != getattr(settings, name.lower()) for name in _LIKENESS
        )
        apart += bool(then.lora_r) != bool(settings.lora_r)
        size = sequences_per_step(then) * then.max_length
        step = size / speed
        flop = size * past.shape.flop_per_token(then.max_length, not then.lora_r)
        rate = flop / max(step - fixed_seconds(past.shape, then, place), step / 2)
        start = max(0.0, past.manifest["seconds"] - tokens / speed)
        rates.append((apart, (rate, start, past.run)))
    return min(rates, key=lambda pair: pair[0])[1] if rates else None


def fixed_seconds(shape: Shape, settings: Settings, place: Place) -> float:
    """Seconds of a step that its tokens do not change: the optimizer, exchanges, and starting each
    operation. Fitted to runs on a CPU; not known, and 0, elsewhere."""
    if place.device != "cpu":
        return 0.0
    trained = trainable(shape, settings) / settings.tensor_parallel_size
    layers = shape.layers * settings.gradient_accumulation_steps
    return _PER_PARAMETER * trained + _PER_LAYER * layers


def stage_seconds(
    stage: str, run: str, shape: Shape | None, place: Place, outputs: Path
) -> Estimate:
    """How long a stage other than train takes: as long as it did in this run, else in another."""
    past = past_of(stage, outputs, place) if place.here else []
    own = [one for one in past if one.run == run]
    if own:
        return Estimate(own[0].manifest["seconds"], f"measured on this machine in run {run}")
    if not past:
        where = (
            "it has not run on this machine" if place.here else f"nobody measured a {place.name}"
        )
        return Estimate(None, where)
    other = next((one for one in past if not _took_packages(one)), past[0])
    seconds = float(other.manifest["seconds"])
    if stage not in _SIZES:
        return Estimate(seconds, f"as run {other.run} on this machine, with its own model and data")
    if shape is None or other.shape is None:
        return Estimate(None, "the model's size is not known")
    size, start = _SIZES[stage]
    ratio = (start + size(shape)) / (start + size(other.shape))
    if ratio != 1 and stage == "compile-inference" and place.device != "cpu":
        return Estimate(None, f"run {other.run} compiled a model of another size")
    basis = f"run {other.run} on this machine x {ratio:.3g}, for the model's size"
    return Estimate(seconds * ratio, basis)


def _took_packages(past: Past) -> bool:
    """Whether a compile-inference took what had been compiled before."""
    metrics = past.manifest.get("metrics")
    return isinstance(metrics, dict) and metrics.get("packages_kept") is True


def write_rate(place: Place, outputs: Path) -> tuple[float, str] | None:
    """Bytes per second that the latest consolidate on this machine wrote once it had started, with
    all that it did meanwhile, and its run. None where `place` is another, or too little was
    written."""
    size, start = _SIZES["consolidate"]
    for past in past_of("consolidate", outputs, place) if place.here else []:
        written = sum(facts["bytes"] for facts in past.manifest["outputs"].values())
        if past.shape and written >= LEAST_WRITTEN:
            seconds = past.manifest["seconds"] * size(past.shape) / (start + size(past.shape))
            return written / seconds, past.run
    return None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
