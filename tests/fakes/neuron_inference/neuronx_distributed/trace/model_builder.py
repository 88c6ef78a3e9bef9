"""ModelBuilder: "compiles" by keeping what builds each graph's module, and runs those modules as
the graphs of a NEFF would."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn


class BaseModelInstance:
    """What optimum-neuron derives its graphs' makers from."""


class ModelBuilder:
    def __init__(
        self,
        *,
        tp_degree: int,
        checkpoint_loader: Callable[[], dict[str, torch.Tensor]],
        compiler_workdir: str,
        **named: Any,
    ):
        self.tp_degree, self.checkpoint_loader, self.workdir = (
            tp_degree,
            checkpoint_loader,
            Path(compiler_workdir),
        )
        self.graphs: dict[str, Any] = {}
        self.flags: dict[str, str] = {}

    def add(
        self,
        key: str,
        model_instance: Any,
        example_inputs: list[Any],
        compiler_args: str,
        **named: Any,
    ) -> None:
        self.graphs[key], self.flags[key] = model_instance, compiler_args

    def trace(self, initialize_model_weights: bool) -> Program:
        """Leaves log files in an emptied workdir, as the real one does; FAKE_COMPILER_FAILS is
        the message of a crash."""
        shutil.rmtree(self.workdir, ignore_errors=True)
        for key, flags in self.flags.items():
            (self.workdir / key).mkdir(parents=True)
            target = os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"]
            (self.workdir / key / "log-neuron-cc.txt").write_text(
                f"{flags} for {target}", encoding="utf-8"
            )
        if message := os.environ.get("FAKE_COMPILER_FAILS"):
            raise RuntimeError(message)
        return Program(self.graphs)

    def shard_checkpoint(self, serialize_path: str | None = None) -> list[dict[str, torch.Tensor]]:
        checkpoint = self.checkpoint_loader()
        graph = next(iter(self.graphs.values()))
        graph.load_module()
        _before_sharding(graph.module, checkpoint, "")
        names = graph.module.state_dict().keys()
        shard = {name: tensor.contiguous() for name, tensor in checkpoint.items() if name in names}
        if serialize_path:
            os.makedirs(serialize_path, exist_ok=True)
            for rank in range(self.tp_degree):
                save_file(
                    shard, os.path.join(serialize_path, f"tp{rank}_sharded_checkpoint.safetensors")
                )
        return [shard] * self.tp_degree


def _before_sharding(module: nn.Module, checkpoint: dict[str, torch.Tensor], prefix: str) -> None:
    if hasattr(module, "preshard_hook"):
        module.preshard_hook(checkpoint, f"{prefix}weight")
    for name, child in module.named_children():
        _before_sharding(child, checkpoint, f"{prefix}{name}.")


class Program:
    """Prefill and decode with one KV cache that both write: the part of a compiled TorchScript
    program that is called."""

    def __init__(self, graphs: dict[str, Any]):
        self.graphs = graphs
        self.nxd_model = self

    def save(self, path: str, _extra_files: Any = None) -> None:
        torch.save(self.graphs, path)

    def initialize(self, weights: list[dict[str, torch.Tensor]], start_rank: torch.Tensor) -> None:
        for graph in self.graphs.values():
            graph.load_module()
            missing, unexpected = graph.module.load_state_dict(weights[0], strict=False)
            assert not unexpected and all("past_key_values" in name for name in missing), (
                missing,
                unexpected,
            )

    @torch.no_grad()
    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        seq_ids: torch.Tensor,
        sampling: torch.Tensor,
    ) -> torch.Tensor:
        """The graph is chosen by shape and dtype, as the compiled program chooses; any other shape
        is none that was compiled."""
        graph = self.graphs["context_encoding" if ids.shape[1] > 1 else "token_generation"]
        config = graph.neuron_config
        length = config.sequence_length if ids.shape[1] > 1 else 1
        expected = [(config.batch_size, length)] * 2 + [
            (config.batch_size,),
            (config.batch_size, 3),
        ]
        assert [tuple(tensor.shape) for tensor in (ids, positions, seq_ids, sampling)] == expected
        dtypes = [torch.int32] * 3 + [torch.float32]
        assert [tensor.dtype for tensor in (ids, positions, seq_ids, sampling)] == dtypes
        result, *cache = graph.module(ids, positions.to(torch.int64), seq_ids, sampling)
        for other in self.graphs.values():
            for kept, new in zip(other.module.kv_mgr.past_key_values, cache, strict=True):
                kept.data.copy_(new)
        return result


def _load(path: str) -> Program:
    return Program(torch.load(path, weights_only=False))


torch.jit.load = _load
