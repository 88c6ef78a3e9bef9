"""The folder of a compiled model, as optimum-neuron writes and reads it.

neuron_config.json names the versions that compiled the model and its target: the model loads only
with exactly those. optimum-neuron checks that too, but reports one problem at a time and with a
traceback.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.run.errors import InputError
from stages.run.layout import CONFIG_FILE

NEURON_CONFIG, PROGRAM = "neuron_config.json", "model.pt"

# AWS's packages that optimum-neuron's inference imports. On PyPI the projects of these names
# contain no code.
PACKAGES = ("libneuronxla", "neuronx_distributed", "neuronxcc", "torch_neuronx", "torch_xla")


@dataclass(frozen=True)
class Runtime:
    """The versions and devices that run compiled models here.

    `target` is the compiler's name for the devices; without devices it is None and `cores` is 0.
    """

    optimum_neuron: str
    neuronx_cc: str
    target: str | None
    cores: int


def missing_packages() -> list[str]:
    """The packages that compiling and running need and that are not installed."""
    return [name for name in ("optimum.neuron", *PACKAGES) if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is not installed
        return False


def this_runtime() -> Runtime:
    """The runtime as optimum-neuron sees it when it loads a model. Needs the packages above.

    Raises InputError for an instance type that optimum-neuron does not know.
    """
    from optimum.neuron.utils.instance import current_instance_type
    from optimum.neuron.utils.system import get_available_cores
    from optimum.neuron.utils.version_utils import get_neuronxcc_version
    from optimum.neuron.version import __version__

    cores = get_available_cores()
    try:
        target = current_instance_type() if cores else None
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"optimum-neuron {__version__} does not know this machine: {error}. Run it on a trn1, "
            "trn2 or inf2 instance."
        ) from None
    return Runtime(__version__, get_neuronxcc_version(), target, cores)


def read_description(folder: Path) -> dict[str, Any]:
    """neuron_config.json; raises InputError if it is missing."""
    if not (folder / NEURON_CONFIG).is_file():
        raise InputError(
            f"{folder} has no model compiled for Neuron: {NEURON_CONFIG} is missing. "
            "Run `make compile-inference` first."
        )
    return json.loads((folder / NEURON_CONFIG).read_text(encoding="utf-8"))


def missing_files(folder: Path, cores: int) -> list[str]:
    """The files that a model compiled for `cores` cores lacks.

    Without its weights optimum-neuron would look for others on the Hub.
    """
    return [
        name
        for name in (CONFIG_FILE, NEURON_CONFIG, PROGRAM, *weight_files(cores))
        if not (folder / name).is_file()
    ]


def weight_files(cores: int) -> list[str]:
    """Each core's file of weights, in order of rank."""
    return [f"checkpoint/weights/tp{rank}_sharded_checkpoint.safetensors" for rank in range(cores)]


def problems_on(runtime: Runtime, description: dict[str, Any]) -> Iterator[str]:
    """Why the model that `description` describes cannot run on `runtime`."""
    for name, compiled_with, installed in (
        ("optimum-neuron", description["optimum_neuron_version"], runtime.optimum_neuron),
        ("neuronx-cc", description["neuronxcc_version"], runtime.neuronx_cc),
    ):
        if compiled_with != installed:
            yield f"it was compiled with {name} {compiled_with}, this is {name} {installed}"
    target, cores = description["target"], description["tp_degree"]
    if runtime.target is None:
        yield f"it was compiled for {target}, and there is no Neuron device here"
        return
    if runtime.target != target:
        yield f"it was compiled for {target}, this machine is a {runtime.target}"
    if runtime.cores < cores:
        yield (
            f"it runs on {cores} NeuronCores (INFERENCE_TENSOR_PARALLEL_SIZE), this machine has "
            f"{runtime.cores}"
        )
