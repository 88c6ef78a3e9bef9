"""Which backend runs here, and its modules, imported only when a stage asks for one.

What a module must offer is in contract.py. Standard library only at the top: make asks which
backend runs at every start.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from stages.run.settings import Settings

if TYPE_CHECKING:
    from stages.run import contract


@dataclass(frozen=True)
class Choice:
    """A backend's name (its package below `stages.backends`) and why it was chosen."""

    name: str
    reason: str


def find_backend() -> Choice:
    """Neuron where its device nodes are, else PyTorch (which prefers CUDA to the CPU)."""
    devices = len(list(Path("/dev").glob("neuron[0-9]*")))
    if devices:
        return Choice("neuron", f"{devices} Neuron device{'s' if devices > 1 else ''} in /dev")
    return Choice("torch", "no Neuron devices in /dev")


def choose(settings: Settings) -> Choice:
    """The backend that BACKEND names, or the one found."""
    if settings.backend != "auto":
        return Choice(settings.backend, f"BACKEND={settings.backend}")
    return find_backend()


@overload
def backend_module(name: Literal["check"], settings: Settings) -> contract.Check: ...
@overload
def backend_module(name: Literal["train"], settings: Settings) -> contract.Train: ...
@overload
def backend_module(name: Literal["precompile"], settings: Settings) -> contract.Precompile: ...
@overload
def backend_module(name: Literal["consolidate"], settings: Settings) -> contract.Consolidate: ...
@overload
def backend_module(
    name: Literal["compile_inference"], settings: Settings
) -> contract.CompileInference: ...
@overload
def backend_module(name: Literal["generate"], settings: Settings) -> contract.Generate: ...
@overload
def backend_module(name: Literal["serve"], settings: Settings) -> contract.Serve: ...
@overload
def backend_module(name: Literal["doctor"], settings: Settings) -> contract.Doctor: ...
def backend_module(name: str, settings: Settings) -> Any:
    """Module `name` of the chosen backend."""
    return importlib.import_module(f"stages.backends.{choose(settings).name}.{name}")
