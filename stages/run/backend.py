"""Which backend runs here, and its modules, imported only when a stage asks for one.

What a module must offer is in contract.py. Standard library only at the top: make asks which
backend runs at every start.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from stages.run.cost import instance_type
from stages.run.settings import Settings

DEVICE_NODES = Path("/dev")
NATIVE_INSTANCES = ("trn2", "trn3")  # where AWS's PyTorch has a device of its own

if TYPE_CHECKING:
    from stages.run import contract


@dataclass(frozen=True)
class Choice:
    """A backend's name (its package below `stages.backends`) and why it was chosen. `on_neuron`:
    it is PyTorch, and this is a Trainium 2 or 3, which AWS's PyTorch runs on natively."""

    name: str
    reason: str
    on_neuron: bool = False


def find_backend() -> Choice:
    """optimum-neuron on Trainium 1 and Inferentia 2, else PyTorch."""
    devices = len(list(DEVICE_NODES.glob("neuron[0-9]*")))
    if not devices:
        return Choice("torch", f"no Neuron devices in {DEVICE_NODES}")
    found, instance = f"{devices} Neuron device{'s' if devices > 1 else ''}", instance_type() or ""
    if instance.startswith(NATIVE_INSTANCES):
        return Choice("torch", f"{found} of a {instance}, natively", on_neuron=True)
    return Choice("neuron", f"{found} in {DEVICE_NODES}")


def choose(settings: Settings) -> Choice:
    """The backend that BACKEND or DEVICE names, or the one found."""
    backend, device, found = settings.backend, settings.device, find_backend()
    if backend == device == "auto":
        return found
    on_neuron = device == "neuron" or (device == "auto" and backend == "torch" and found.on_neuron)
    if backend == "auto":
        return Choice("torch", f"DEVICE={device}", on_neuron)
    return Choice(backend, f"BACKEND={backend}", on_neuron)


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
