"""Whether a training fits the memory of a place, and the smallest change that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from stages.forecast.machine import Place
from stages.forecast.memory import Need, neuron_memory, training_memory
from stages.forecast.parameters import Shape
from stages.run.backend import backend_module
from stages.run.errors import InputError
from stages.run.progress import show_size
from stages.run.settings import Settings

# Of a memory, what a forecast may take and be said to fit. A CPU's forecasts of a few steps were 5%
# too low at worst, and trainings in less memory than this asks for ended well
# (tests/benchmarks/results/2026-11-29-forecasts.md); a long one grows, and no GPU was measured.
EDGE = 0.84
# Bytes of a training on a CPU beside its ranks: torchrun's process and the stage's.
LAUNCHERS = 250 * 10**6


def need_of(shape: Shape, settings: Settings, place: Place, traced: int | None = None) -> Need:
    """The memory of one rank of the training on `place`."""
    if place.backend == "neuron":
        return neuron_memory(shape, settings)
    return training_memory(shape, settings, place.device, traced)


def in_all(rank: int, settings: Settings, place: Place) -> int:
    """Bytes that are compared with the memory of `place`, where one of the ranks has `rank` bytes:
    on a CPU they share the host's, with what started them."""
    return rank * settings.nproc_per_node + LAUNCHERS if place.device == "cpu" else rank


def verdict(settings: Settings, shape: Shape, place: Place, total: int) -> str:
    """Whether `total` bytes fit the memory of `place`, and what would where they do not."""
    if place.device_memory is None:
        return "whether that fits is unknown: so is this device's memory"
    of = f"{show_size(place.device_memory)} of {place.name}'s {place.device}"
    if place.machine and settings.nproc_per_node > place.machine.cores and place.device != "cpu":
        return f"NPROC_PER_NODE={settings.nproc_per_node} is above its {place.machine.cores} cores"
    if total <= place.device_memory:
        near = f"MAY NOT FIT {of}: it leaves less than {1 - EDGE:.0%}"
        return near if total > EDGE * place.device_memory else f"fits {of}"
    return f"DOES NOT FIT {of}. {remedy(settings, shape, place)}"


def remedy(settings: Settings, shape: Shape, place: Place) -> str:
    """What to change of a training that does not fit `place`."""
    change = smallest_change(shape, settings, place)
    if change:
        return f"The smallest change: {change}"
    return (
        "No change that was tried makes it fit: checkpointing, smaller micro-batches, tensor or "
        "data parallelism, LORA_R=16, a shorter MAX_LENGTH."
    )


def smallest_change(shape: Shape, settings: Settings, place: Place) -> str:
    """The first of the changes below with which the training fits and that no check refuses, as
    settings; empty for none."""
    if place.device_memory is None:
        return ""
    before = _refusals(shape, settings, place)
    for change in _changes(shape, settings, place):
        changed = replace(settings, **change)
        total = in_all(need_of(shape, changed, place).bytes, changed, place)
        fits = total <= EDGE * place.device_memory
        if fits and _refusals(shape, changed, place) <= before:
            return " ".join(f"{name.upper()}={int(value)}" for name, value in change.items())
    return ""


def _refusals(shape: Shape, settings: Settings, place: Place) -> set[str]:
    """What the checks of the settings, and of the backend of `place`, say against a training."""
    found: set[str] = set()
    check = backend_module("check", replace(settings, backend=place.backend))
    try:
        Settings.read(settings.environment())
    except InputError as error:
        found.update(error.problems)
    try:
        found.update(check.training_problems(settings, shape.config, vocabulary=0))
    except InputError as error:  # NEURON_RT_* names no cores
        found.update(error.problems)
    except (AttributeError, TypeError):  # config.json lacks a value: the stage says so
        pass
    return found


def _changes(shape: Shape, settings: Settings, place: Place) -> Iterator[dict[str, Any]]:
    """From what changes nothing but time, to what changes the result."""
    gentle: dict[str, Any] = {}
    if not settings.gradient_checkpointing:
        gentle = {"gradient_checkpointing": True}
        yield gentle
    batch = settings.per_device_train_batch_size
    smaller = dict(gentle)
    for divisor in (2, 4, 8, 16):
        if batch % divisor == 0:
            smaller = {
                **gentle,
                "per_device_train_batch_size": batch // divisor,
                "gradient_accumulation_steps": settings.gradient_accumulation_steps * divisor,
            }
            yield smaller
    cores = place.machine.cores if place.machine else settings.nproc_per_node
    tensor = 2 * settings.tensor_parallel_size
    while tensor <= cores:
        ranks = max(settings.nproc_per_node, tensor * settings.pipeline_parallel_size)
        yield {**smaller, "tensor_parallel_size": tensor, "nproc_per_node": ranks}
        tensor *= 2
    if place.device != "cpu" and cores > settings.nproc_per_node:
        yield {**smaller, "nproc_per_node": cores}
    if not settings.lora_r:
        yield {**gentle, "lora_r": 16}
        yield {**smaller, "lora_r": 16}
    for divisor in (2, 4, 8):
        yield {**smaller, "max_length": settings.max_length // divisor}
