"""Modules in the place of torch_xla, neuronx_distributed and the rest: optimum-neuron's models are
built and saved in one process.

Only what shapes a checkpoint is real: the parallel layers' parameters with their attributes, the
ranks (`PLACE`, which the caller sets to play one rank after another), and save_checkpoint, which
writes files as neuronx-distributed 0.15 lays them out. Every other name is a class or a function
that does nothing. For a process of its own: nothing here is taken back.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

PACKAGES = ("torch_xla", "neuronx_distributed", "libneuronxla", "torch_neuronx", "neuronxcc", "nki")
PLACE = SimpleNamespace(tp_size=1, tp_rank=0, pp_size=1, pp_rank=0)


class FakeMachine(ModuleType):
    """Has every name: capitalised ones are classes of modules, the others functions that return
    None."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if f"{self.__name__}.{name}" in PARTS:
            return importlib.import_module(f"{self.__name__}.{name}")
        made = type(name, (nn.Module,), {}) if name[0].isupper() else (lambda *_, **__: None)
        made.__name__ = name
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)
            if name.partition(".")[0] in PACKAGES
            else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> FakeMachine:
        return FakeMachine(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        for name, value in PARTS.get(module.__name__, {}).items():
            setattr(module, name, value)


class TensorReference:
    def __init__(self, tid: int):
        self.tid = tid


TensorReference.__module__ = "torch_xla.utils.serialization"


class ToXlaTensorArena:
    """Replaces the tensors (what `select` picks) in a dict by what `convert` makes of them all."""

    def __init__(self, convert: Any, select: Any):
        self.convert, self.select = convert, select

    def transform(self, state: dict[str, Any]) -> dict[str, Any]:
        names = [name for name, value in state.items() if self.select(value)]
        return {
            **state,
            **dict(zip(names, self.convert([state[name] for name in names]), strict=True)),
        }


class ParallelLayer(nn.Module):
    """A layer with one weight of which each rank has a part."""

    def add_weight(
        self, name: str, rows: int, columns: int, dimension: int, stride: int = 1, dtype: Any = None
    ) -> None:
        shape = [rows, columns]
        shape[dimension] //= PLACE.tp_size
        weight = nn.Parameter(torch.empty(shape, dtype=dtype or torch.float32))
        weight.tensor_model_parallel, weight.partition_dim = True, dimension
        weight.partition_stride, weight.num_partitions = stride, PLACE.tp_size
        setattr(self, name, weight)

    def initialize_weight_and_bias(self) -> None:
        """The weights come from a checkpoint: this would be seen in the results."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))

    init_weight_cpu = initialize_weight_biases = initialize_weight_and_bias

    def set_options(self, options: dict[str, Any]) -> None:
        for name in (
            "gather_output",
            "input_is_parallel",
            "sequence_parallel_enabled",
            "sequence_dimension",
        ):
            setattr(self, name, options.get(name))
        self.tensor_parallel_group = None


class BaseParallelLinear(ParallelLayer):
    pass


class ColumnParallelLinear(BaseParallelLinear):
    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, dtype: Any = None, **options: Any
    ):
        super().__init__()
        self.input_size, self.output_size = inputs, outputs
        self.set_options(options)
        self.add_weight("weight", outputs, inputs, 0, stride, dtype)


class RowParallelLinear(BaseParallelLinear):
    def __init__(self, inputs: int, outputs: int, dtype: Any = None, **options: Any):
        super().__init__()
        self.input_size, self.output_size = inputs, outputs
        self.set_options(options)
        self.add_weight("weight", outputs, inputs, 1, dtype=dtype)


class ParallelEmbedding(ParallelLayer):
    def __init__(self, entries: int, size: int, padding: Any = None, dtype: Any = None, **_: Any):
        super().__init__()
        self.num_embeddings, self.embedding_dim = entries, size
        self.add_weight("weight", entries, size, 0, dtype=dtype)


class GQAQKVColumnParallelLinear(BaseParallelLinear):
    def __init__(
        self,
        input_size: int,
        output_sizes: list[int],
        kv_size_multiplier: int = 1,
        fuse_qkv: bool = True,
        dtype: Any = None,
        **options: Any,
    ):
        super().__init__()
        self.input_size, self.output_sizes = input_size, output_sizes
        self.kv_size_multiplier, self.fuse_qkv, self.dtype, self.arg_init_method = (
            kv_size_multiplier,
            fuse_qkv,
            dtype,
            None,
        )
        self.set_options(options)
        self.q_output_size_per_partition = output_sizes[0] // PLACE.tp_size
        self.kv_output_size_per_partition = output_sizes[1] * kv_size_multiplier // PLACE.tp_size
        if fuse_qkv:  # neuronx-distributed gives this one no attributes
            rows = self.q_output_size_per_partition + 2 * self.kv_output_size_per_partition
            self.weight_qkv = nn.Parameter(torch.empty(rows, input_size, dtype=dtype))
        else:
            self.add_weight("weight_q", output_sizes[0], input_size, 0, dtype=dtype)
            self.add_weight(
                "weight_k", output_sizes[1] * kv_size_multiplier, input_size, 0, dtype=dtype
            )
            self.add_weight(
                "weight_v", output_sizes[1] * kv_size_multiplier, input_size, 0, dtype=dtype
            )


def create_local_weight(
    full: torch.Tensor, dimension: int, size: int, stride: int, out_weight: Any = None
) -> torch.Tensor:
    pieces = full.split(size // stride, dimension)
    return torch.cat(pieces[PLACE.tp_rank :: PLACE.tp_size], dimension)


def save_checkpoint(
    folder: str, tag: str, model: Any, use_xser: bool, optimizer: Any = None, **_: Any
) -> None:
    """One rank's part of neuronx_distributed.trainer.save_checkpoint."""
    shards = Path(folder) / tag
    path = (
        shards / "model" / f"dp_rank_00_tp_rank_{PLACE.tp_rank:02d}_pp_rank_{PLACE.pp_rank:02d}.pt"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    (shards / "checkpoint").write_text("1")
    state = dict(model) if isinstance(model, dict) else model.state_dict()
    if use_xser:
        for name in [name for name, tensor in state.items() if tensor.is_meta]:
            del state[name]
        tensors = path.with_name(f"{path.name}.tensors")
        tensors.mkdir()
        information = {}
        for number, (name, tensor) in enumerate(state.items()):
            torch.save(tensor.cpu(), tensors / f"tensor_{number}.pt")
            information[number] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "expert_model_parallel": False,
            }
            state[name] = TensorReference(number)
        torch.save(information, path.with_name(f"{path.name}.info.pt"))
    torch.save(state, path)
    (shards / "done").write_text("1")


def parallel_state() -> dict[str, Any]:
    return {
        "get_tensor_model_parallel_size": lambda: PLACE.tp_size,
        "get_tensor_model_parallel_rank": lambda: PLACE.tp_rank,
        "get_pipeline_model_parallel_size": lambda: PLACE.pp_size,
        "get_pipeline_model_parallel_rank": lambda: PLACE.pp_rank,
        "get_data_parallel_rank": lambda: 0,
        "get_data_parallel_size": lambda: 1,
        "model_parallel_is_initialized": lambda: True,
    }


LAYERS = {
    kind.__name__: kind
    for kind in (BaseParallelLinear, ColumnParallelLinear, RowParallelLinear, ParallelEmbedding)
}
PARTS: dict[str, dict[str, Any]] = {
    "neuronx_distributed.parallel_layers.layers": {
        **LAYERS,
        "create_local_weight": create_local_weight,
    },
    "neuronx_distributed.parallel_layers.parallel_state": parallel_state(),
    "neuronx_distributed.parallel_layers.utils": {
        "divide": lambda number, by: number // by,
        "get_local_world_size": lambda: 1,
    },
    "neuronx_distributed.modules.qkv_linear": {
        "GQAQKVColumnParallelLinear": GQAQKVColumnParallelLinear
    },
    "neuronx_distributed.trainer": {"save_checkpoint": save_checkpoint},
    "torch_xla.runtime": {
        "local_ordinal": lambda: 0,
        "global_ordinal": lambda: 0,
        "world_size": lambda: 1,
    },
    "torch_xla.utils.serialization": {"TensorReference": TensorReference},
    "torch_xla.core.xla_model": {
        "ToXlaTensorArena": ToXlaTensorArena,
        "get_local_ordinal": lambda: 0,
    },
}


def install() -> None:
    sys.meta_path.insert(0, Finder())
