"""What `make plan` says of prices: of this run, and of machines side by side. Standard library
only."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import date
from pathlib import Path

from stages.forecast.fits import EDGE, need_of
from stages.forecast.machine import Place, place_of
from stages.forecast.minutes import UTILISATIONS, training_seconds
from stages.forecast.parameters import Shape
from stages.forecast.planned import estimate
from stages.run.cost import dollars
from stages.run.machines import MACHINES, OLDEST_DAYS, PRICES_OF, REGION
from stages.run.progress import duration, show_size
from stages.run.settings import Settings

# Stages that use no accelerator: always, and on Neuron, whose compiler runs on the host.
HOST_STAGES = {
    "torch": ("data", "consolidate"),
    "neuron": ("data", "consolidate", "compile-inference"),
}


def price_lines(
    settings: Settings,
    place: Place,
    run_folder: Path,
    stale: Collection[str],
    shape: Shape | None,
) -> Iterator[str]:
    price = f"{place.price:g} USD/h" if place.price else "USD/h"
    yield f"{price}: {place.price_basis} ({REGION}, read {PRICES_OF})"
    if (date.today() - date.fromisoformat(PRICES_OF)).days > OLDEST_DAYS:
        yield f"that is more than {OLDEST_DAYS} days ago: set INSTANCE_PRICE to what it is now"
    if place.machine and place.machine.spot:
        low, high = place.machine.spot
        yield f"spot was seen from {low} to {high} USD/h; nothing here rests on it"
    if place.device == "cpu":
        return
    on_host = HOST_STAGES[place.backend]
    yield f"{', '.join(on_host)} need no accelerator: run them on a cheap machine"
    times = [
        estimate(stage, settings, run_folder, place, shape, stale).seconds
        for stage in on_host
        if stage in stale
    ]
    yield from _saving(place, times)


def _saving(place: Place, times: list[float | None]) -> Iterator[str]:
    """What stages of these seconds save on the cheapest machine of the table; None: unknown."""
    if place.price is None:
        yield "what that saves is unknown: so is the price here"
        return
    name = min((name for name in MACHINES if MACHINES[name].price), key=_price_of)
    saved = place.price - _price_of(name)
    if saved <= 0:
        return
    yield f"such as {name}, {_price_of(name):g} USD/h ({MACHINES[name].source})"
    seconds = [time for time in times if time is not None]
    if seconds:
        some = ", without those of unknown time" if len(seconds) < len(times) else ""
        total = f"{duration(sum(seconds))} save {dollars(sum(seconds), saved):.2f} USD{some}"
        yield f"their {total}, if they are as fast there"
    elif times:
        yield f"their time is unknown: each hour saves {saved:.2f} USD, if they are as fast there"


def _price_of(name: str) -> float:
    return MACHINES[name].price or 0.0


def compare_lines(settings: Settings, run_folder: Path, shape: Shape | None) -> Iterator[str]:
    yield f"{'':<16}{'memory of a rank':<29}{'tokens/s':>9}{'USD/h':>8}{'USD/M tokens':>14}  basis"
    for name in settings.compare.split():
        place = place_of(settings, name)
        memory = "unknown"
        if shape is not None:
            need = need_of(shape, settings, place).bytes
            has = place.device_memory or 0
            near = "MAY NOT fit" if need <= has else "NOT in"
            memory = f"{show_size(need)} {'fits' if need <= EDGE * has else near} {show_size(has)}"
        time = training_seconds(shape, settings, 10**9, place, run_folder.parent)
        speed = f"{1e9 / time.seconds:,.0f}" if time.seconds else "unknown"
        each = dollars(time.seconds, place.price) / 1000 if time.seconds and place.price else None
        price = f"{place.price:g}" if place.price else "unknown"
        yield (
            f"{name:<16}{memory:<29}{speed:>9}{price:>8}"
            f"{f'{each:.3g}' if each is not None else 'unknown':>14}  {time.basis}"
        )
        device = MACHINES[name].device
        if device in UTILISATIONS:
            yield f"{'':<16}others there: {UTILISATIONS[device][2]}"
