"""Whether a training fits the memory of a place, and the smallest change that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from stages.forecast.machine import Place
from stages.forecast.memory import Need, neuron_memory, training_memory
from stages.forecast.parameters import Shape
from stages.run.settings import Settings


def need_of(shape: Shape, settings: Settings, place: Place, traced: int | None = None) -> Need:
    """The memory of one rank of the training on `place`."""
    if place.backend == "neuron":
        return neuron_memory(shape, settings)
    return training_memory(shape, settings, place.device, traced)


def in_all(need: Need, settings: Settings, place: Place) -> int:
    """Bytes that are held against the memory of `place`: on a CPU all ranks share the host's."""
    return need.bytes * (settings.nproc_per_node if place.device == "cpu" else 1)


def smallest_change(shape: Shape, settings: Settings, place: Place) -> str:
    """The first of the changes below with which the training fits, as settings; empty for none."""
    if place.device_memory is None:
        return ""
    for change in _changes(shape, settings, place):
        changed = replace(settings, **change)
        if in_all(need_of(shape, changed, place), changed, place) <= place.device_memory:
            return " ".join(f"{name.upper()}={int(value)}" for name, value in change.items())
    return ""


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
    while tensor <= cores and shape.heads % tensor == shape.intermediate % tensor == 0:
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
