"""The machine that a forecast is for: INSTANCE's, or this one. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.run.backend import choose
from stages.run.cost import hourly_price, instance_type
from stages.run.host import host_memory
from stages.run.machines import MACHINES, Machine
from stages.run.settings import Settings

NVIDIA = Path("/dev/nvidia0")


@dataclass(frozen=True)
class Place:
    """`here`: whether it is this machine. `device`: cpu, cuda or neuron; `machine` its row of the
    table, None where it has none. Memory in bytes, None where unknown; `price` in USD per hour."""

    name: str
    here: bool
    device: str
    backend: str
    machine: Machine | None
    device_memory: int | None
    host_memory: int | None
    price: float | None
    price_basis: str


def place_of(settings: Settings, name: str = "") -> Place:
    """The machine `name`, else INSTANCE's, else this one."""
    name, own = name or settings.instance, instance_type()
    machine = MACHINES.get(name or own or "")
    if name and machine:
        return _of_table(settings, name, machine, here=name == own)
    chosen = choose(settings)
    device = "cpu"
    if chosen.name == "neuron" or chosen.on_neuron:
        device = "neuron"
    elif settings.device == "cuda" or (settings.device == "auto" and NVIDIA.exists()):
        device = "cuda"
    host, price = host_memory(), hourly_price(settings)
    return Place(
        own or "this machine",
        *(True, device, chosen.name, machine),
        host if device == "cpu" else machine.core_memory if machine else None,
        *(host, price, _price_basis(settings, machine)),
    )


def _of_table(settings: Settings, name: str, machine: Machine, here: bool) -> Place:
    # INSTANCE_PRICE is of one machine: this one, or the one that is planned for.
    priced = name == settings.instance or (here and not settings.instance)
    native = machine.device == "Trainium2"
    backend = "neuron" if machine.is_neuron and not native else "torch"
    return Place(
        *(name, here, "neuron" if machine.is_neuron else "cuda", backend, machine),
        *(machine.core_memory, machine.host_memory * 2**30),
        (priced and settings.instance_price) or machine.price,
        _price_basis(settings, machine, priced),
    )


def _price_basis(settings: Settings, machine: Machine | None, priced: bool = True) -> str:
    if priced and settings.instance_price:
        return "INSTANCE_PRICE"
    if machine is None:
        return "unknown: no EC2 type of the table; set INSTANCE_PRICE"
    if machine.price:
        return f"on demand, {machine.source}"
    if machine.doubt:
        return f"unknown: {machine.doubt}"
    block = f"; a capacity block was {machine.block} USD/h" if machine.block else ""
    return f"unknown: no price on demand is listed{block}. Set INSTANCE_PRICE"
