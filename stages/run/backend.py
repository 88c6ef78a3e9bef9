"""Which backend runs here, and its modules, imported only when a stage asks for one.

A backend is a package below this one with a module per stage that differs between machines; adding a backend is
adding such a package and the sign by which it is found. Standard library only at the top: make asks at every start.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from stages.run.errors import InputError
from stages.run.settings import Settings


@dataclass(frozen=True)
class Choice:
    """A backend's name (its package below `stages.backends`) and why it was chosen, in words."""

    name: str
    reason: str


def find_backend() -> Choice:
    """Neuron where its device nodes are, else PyTorch (which itself prefers CUDA to the CPU)."""
    devices = len(list(Path("/dev").glob("neuron[0-9]*")))
    if devices:
        return Choice("neuron", f"{devices} Neuron device{'s' if devices > 1 else ''} in /dev")
    return Choice("torch", "no Neuron devices in /dev")


def choose(settings: Settings) -> Choice:
    """The backend that BACKEND names, or the one found."""
    if settings.backend != "auto":
        return Choice(settings.backend, f"BACKEND={settings.backend}")
    return find_backend()


def backend_module(name: str, settings: Settings) -> ModuleType:
    """Module `name` of the chosen backend; raises InputError when that backend is not part of this version."""
    chosen = choose(settings)
    package = f"stages.backends.{chosen.name}"
    if (
        importlib.util.find_spec(package) is None
        or importlib.util.find_spec(f"{package}.{name}") is None
    ):
        raise InputError(
            f"The {chosen.name} backend ({chosen.reason}) has no {name} in this version. Set BACKEND=torch."
        )
    return importlib.import_module(f"{package}.{name}")
