"""How far the forecasts in this machine's manifests were off. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stages.forecast.fits import EDGE
from stages.forecast.machine import Place
from stages.make.results import runs_of
from stages.run.manifest import manifest_of

# What is forecast -> its entry in a manifest, and the stages whose forecast is worth publishing.
PUBLISHED = {
    "memory": ("peak_memory_bytes", ("precompile", "train")),
    "time": ("seconds", ("train",)),
}


def accuracy(outputs: Path, place: Place) -> Iterator[str]:
    """A line for each of PUBLISHED: how many forecasts below `outputs`, their mean and worst
    error."""
    for what, (quantity, stages) in PUBLISHED.items():
        pairs = list(_pairs(outputs, quantity, stages))
        if not pairs:
            yield f"no {what} forecasts on this machine yet"
            continue
        off = [abs(planned / measured - 1) for planned, measured in pairs]
        memory = place.device_memory if what == "memory" and place.here else None
        yield (
            f"{len(off)} {what} forecast{'s' if len(off) > 1 else ''} on this machine: mean "
            f"{sum(off) / len(off):.1%}, worst {max(off):.1%}"
            f"{'' if memory is None else _wrong_fits(pairs, memory)}"
        )


def _wrong_fits(pairs: list[tuple[float, float]], memory: int) -> str:
    """How many were said to fit `memory` bytes and took more. One that was killed for want of it
    left no manifest."""
    wrong = sum(planned <= EDGE * memory and memory < measured for planned, measured in pairs)
    return f", {wrong or 'no'} wrong fit{'s' if wrong > 1 else ''} among those that ended"


def _pairs(outputs: Path, quantity: str, stages: tuple[str, ...]) -> Iterator[tuple[float, float]]:
    """What was planned and what was measured, in each manifest that has both."""
    for stage in stages:
        for run in runs_of(outputs, [stage]):
            forecast = (manifest_of(run / stage) or {}).get("forecast")
            pair = forecast.get(quantity) if isinstance(forecast, dict) else None
            if not isinstance(pair, dict):
                continue
            planned, measured = pair.get("planned"), pair.get("measured")
            if isinstance(planned, int | float) and isinstance(measured, int | float):
                yield from [(float(planned), float(measured))] if measured > 0 else []
