"""Writes a tiny Llama as shards, laid out as training lays them out, and next to them the plain
state dict (plain.pt).

Run in 4 processes: `python -m torch.distributed.run --nproc-per-node 4 -m
tests.backends.torch.write_shards FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from stages.backends.torch.rank import run_rank
from tests.tiny_llama import tiny_llama

# Layout -> (data parallel, tensor parallel) size.
LAYOUTS = {"tp": (1, 4), "fsdp": (4, 1), "tp_fsdp": (2, 2)}
TENSOR_PARALLEL_PLAN = {
    **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}


def sharded_state(data_parallel: int, tensor_parallel: int) -> dict[str, torch.Tensor]:
    model = tiny_llama()
    mesh = init_device_mesh("cpu", (data_parallel, tensor_parallel), mesh_dim_names=("dp", "tp"))
    for layer in model.model.layers:
        if tensor_parallel > 1:
            parallelize_module(layer, mesh["tp"], TENSOR_PARALLEL_PLAN)
        if data_parallel > 1:
            fully_shard(layer, mesh=mesh["dp"])
    if data_parallel > 1:
        fully_shard(model, mesh=mesh["dp"])
    return get_model_state_dict(model)


def write(folder: Path) -> None:
    for layout, sizes in LAYOUTS.items():
        dcp.save(
            sharded_state(*sizes),
            storage_writer=HuggingFaceStorageWriter(str(folder / layout), save_distributed=True),
        )
    if dist.get_rank() == 0:
        torch.save(tiny_llama().state_dict(), folder / "plain.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run_rank(lambda device: write(folder), folder / "error")
