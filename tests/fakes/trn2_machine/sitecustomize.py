"""On PYTHONPATH, this makes every Python process one with AWS's native PyTorch, on a CPU.

The project's Device for `neuron` stays what it is, but its tensors are on the CPU and its process
group is Gloo. torch.compile's backend "neuron" is one of torch's own that computes what it was
given (aot_eager), after it has refused what AWS's documents say is refused: shapes that are not
fixed, and more than one graph for a layer. Each graph leaves a file in the NEFF cache. A device
with an index, and one that a rank uses before it has joined the process group, are refused too.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

DEVICE = "stages.backends.device"


def answer(module: ModuleType) -> None:
    """Put the CPU in the place of the device, and the compiler's stand-in in its place."""
    from torch._dynamo import register_backend

    neuron: Any = module.Neuron
    neuron.process_groups = "cpu:gloo"
    neuron.torch_device = first_use
    register_backend(compile_graph, name="neuron")


def first_use(device: Any) -> Any:
    import torch
    import torch.distributed as dist

    if ":" in device.name:
        raise RuntimeError(f"{device.name}: the device has no index")
    if "RANK" in os.environ and not dist.is_initialized():
        raise RuntimeError("the device was used before the process group was made")
    return torch.device("cpu")


def compile_graph(graph: Any, inputs: list[Any]) -> Any:
    import torch
    from torch._dynamo import lookup_backend

    for value in inputs:
        sizes = value.shape if isinstance(value, torch.Tensor) else [value]
        if any(isinstance(size, torch.SymInt) for size in sizes):
            raise RuntimeError("NCC_EMOD025: a shape is not fixed")
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
            raise RuntimeError("float64 is not there")
    said = f"{graph.code} {[getattr(value, 'shape', value) for value in inputs]}"
    cache = Path(os.environ["TORCH_NEURONX_NEFF_CACHE_DIR"])
    cache.mkdir(parents=True, exist_ok=True)
    (cache / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.neff").touch()
    return lookup_backend("aot_eager")(graph, inputs)


class AnswersAfterImport(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != DEVICE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_answer(module: ModuleType) -> None:
            execute(module)
            answer(module)

        spec.loader.exec_module = execute_and_answer  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, AnswersAfterImport())
