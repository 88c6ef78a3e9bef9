"""Distributes a model over ranks: tensor and sequence parallelism, and FSDP2 for data parallelism.

The ranks form a mesh of data parallel x tensor parallel. Inside a tensor-parallel group every
matrix is split by columns or rows, and the activations between them by sequence. Across the groups
FSDP2 keeps float32 master weights, gradients and optimizer state in equal shards and computes in
bfloat16; like ZeRO-1, weights stay gathered between forward and backward. One process is a mesh of
1 x 1: the same code, without communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

from stages.backends.device import device_of
from stages.backends.schedule import data_parallel_size
from stages.backends.torch import attention, lora
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

    attention.register()
    kind = device_of(settings)
    with _without_weights():  # no rank ever has the complete model
        model = AutoModelForCausalLM.from_config(
            pretrained_config(base),
            # Frozen weights need no more bits than the forward computes with.
            dtype=torch.bfloat16 if settings.lora_r and settings.bf16 else torch.float32,
            attn_implementation=kind.attention,
            trust_remote_code=False,
        )
    model.train()
    if settings.lora_r:
        lora.add_adapters(model, settings)
    if settings.tensor_parallel_size > 1:
        _split_layers(model, mesh["tensor"])
        # Splitting replaced the parameter that the input and output embeddings share.
        model.tie_weights()
    if settings.lora_r:
        lora.freeze(model)
    if settings.torch_compile or kind.always_compiles:
        for layer in model.model.layers:
            # Not the layer itself: it has the hook that scatters the sequence, and compiling that
            # hook would lose the embedding's gradient.
            layer.forward = kind.compiled(layer.forward)
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
    _allocate(model, device)
    _read_weights(model, base)
    if settings.lora_r:
        lora.initialise(model, settings)
    return model


def exchange(model: Any, last: bool) -> None:
    """Whether the next backward pass is a step's last: only then the ranks exchange gradients, and
    give up the weights that they gathered."""
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last)


def _split_layers(model: Any, mesh: DeviceMesh) -> None:
    """Tensor parallelism, with sequence parallelism between the matrices.

    Which matrices are split by columns and which by rows, transformers knows for each architecture
    (`base_model_tp_plan`).
    """
    matrices = {"colwise": ColwiseParallel(), "rowwise": RowwiseParallel(output_layouts=Shard(1))}
    layer_plan: dict[str, Any] = {
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    }
    layer = model.model.layers[0]
    for path, style in model.config.base_model_tp_plan.items():
        name = path.removeprefix("layers.*.")
        if isinstance(layer.get_submodule(name), lora.LoraLinear):
            layer_plan |= lora.adapted_plan(name, matrices[style])
        else:
            layer_plan[name] = matrices[style]
    for name, module in layer.named_modules():
        if type(module).__name__.endswith("Norm"):
            # A norm inside the attention (Qwen 3) sees this rank's heads: for its weight that is a
            # part of the sequence like any other.
            layer_plan[name] = SequenceParallel(use_local_output=True)
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


@contextmanager
def _without_weights() -> Iterator[None]:
    """Modules that are created have their parameters on the meta device, where they take no memory.

    Their buffers are real: an architecture computes them when it is created (RoPE's frequencies,
    the scale of an embedding), and no file holds them.
    """
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        # One that is there already is shared: two modules with tied weights.
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta  # type: ignore
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore


def _allocate(model: torch.nn.Module, device: torch.device) -> None:
    """Give the parameters memory on `device`, and move the buffers there."""
    computed = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(computed[name])


def _read_weights(model: torch.nn.Module, base: Path) -> None:
    """Fill the sharded parameters from safetensors.

    Raises what DCP raises for a tensor that is missing or has another shape.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state = {
        name.replace(lora.BASE_LAYER, ""): tensor
        for name, tensor in get_model_state_dict(model).items()
        if ".lora_" not in name
    }
    for name in tied_weights(base):
        state.pop(name)
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(base)))
