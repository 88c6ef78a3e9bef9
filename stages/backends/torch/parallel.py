"""Distributes a Llama over ranks: tensor and sequence parallelism, and FSDP2 for data parallelism.

The ranks form a mesh of data parallel x tensor parallel. Inside a tensor-parallel group every
matrix is split by columns or rows, and the activations between them by sequence. Across the groups
FSDP2 keeps float32 master weights, gradients and optimizer state in equal shards and computes in
bfloat16; like ZeRO-1, weights stay gathered between forward and backward. One process is a mesh of
1 x 1: the same code, without communication.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from stages.backends.schedule import data_parallel_size
from stages.model.check import pretrained_config, tied_weights
from stages.run.settings import Settings


def mesh_of(settings: Settings, device: torch.device) -> DeviceMesh:
    """The ranks as [data parallel, tensor parallel].

    Neighbouring ranks, which have the fastest links, share a layer.
    """
    shape = (data_parallel_size(settings), settings.tensor_parallel_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))


def build_model(
    base: Path, settings: Settings, mesh: DeviceMesh, device: torch.device
) -> torch.nn.Module:
    """The base model, parallelised over `mesh`; each rank reads only its part of the weights."""
    from transformers import AutoModelForCausalLM

    config = pretrained_config(base)
    with torch.device("meta"):  # no rank ever has the complete model
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
    model.train()
    if settings.tensor_parallel_size > 1:
        _split_layers(model, mesh["tensor"])
        # Splitting replaced the parameter that the input and output embeddings share.
        model.tie_weights()
    if settings.torch_compile:
        for layer in model.model.layers:
            # Not the layer itself: it has the hook that scatters the sequence, and compiling that
            # hook would lose the embedding's gradient.
            layer.forward = torch.compile(layer.forward)
    if settings.gradient_checkpointing:
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = checkpoint_wrapper(layer)
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if settings.bf16
        else MixedPrecisionPolicy()
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["data"], mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh["data"], mp_policy=policy, reshard_after_forward=False)
    model.to_empty(device=device)
    # The rotary frequencies are not weights. The module computes them when it is created, which on
    # "meta" gives no values.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config, device=device)
    _read_weights(model, base)
    return model


def _split_layers(model: Any, mesh: DeviceMesh) -> None:
    """Tensor parallelism, with sequence parallelism between the matrices."""
    layer_plan = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }
    # The sequence is scattered at the first layer, not at the embedding: the mask and the rotary
    # embedding need the full length.
    scatter = PrepareModuleInput(
        input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
    )
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Replicate()
        ),
        "model.layers.0": scatter,
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(
            input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
        ),
    }
    for index in range(len(model.model.layers)):
        plan |= {f"model.layers.{index}.{name}": style for name, style in layer_plan.items()}
    parallelize_module(model, mesh, plan)


def _read_weights(model: torch.nn.Module, base: Path) -> None:
    """Fill the sharded parameters from safetensors.

    Raises what DCP raises for a tensor that is missing or has another shape.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state = get_model_state_dict(model)
    for name in tied_weights(base):
        state.pop(name)
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(base)))
