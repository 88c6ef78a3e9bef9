"""Writes tiny models as shards, by optimum-neuron's own models, loading and saving, and what its
reader makes of them.

One process plays each rank in turn: `python -m tests.fakes.nxd_shards FOLDER`. For each layout,
FOLDER/NAME/ then holds

    original/    the model's folder before it was sharded
    adapter/     the adapter before it was sharded
    shards/      what train publishes
    library.pt   what optimum-neuron's reader returns for shards/, or its error

and FOLDER/ queries.json (the library's order of query heads for many sizes) and survivors.json (the
names that its writer leaves).
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.fakes.nxd import PLACE, install
from tests.tiny_llama import tiny_llama

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Layout:
    """How a tiny model is sharded; `config` are changes of its LlamaConfig, `targets` the modules
    that have an adapter."""

    tp: int = 1
    pp: int = 1
    xser: bool = True
    fuse_qkv: bool = False
    kv_size_multiplier: int | None = None
    dtype: torch.dtype = torch.float32
    config: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    # the head is the embeddings' copy, as a pipeline has tied ones: a parameter of either end
    same_ends: bool = False

    def model(self) -> Any:
        model = tiny_llama(**{"vocab_size": 64, **self.config}).to(self.dtype)
        if self.same_ends:
            model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
        return model


EIGHT_HEADS = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
LAYOUTS = {
    "one": Layout(config={"vocab_size": 67}),
    "tp2": Layout(tp=2),
    "tp2_plain": Layout(tp=2, xser=False),
    "tp2_bfloat16": Layout(tp=2, dtype=torch.bfloat16),
    "tp2_fuse_qkv": Layout(tp=2, fuse_qkv=True, config={"num_key_value_heads": 4}),
    "tp4_gqa": Layout(tp=4),
    "tp4_gqa_plain": Layout(tp=4, xser=False),
    "tp4_gqa_fuse_qkv": Layout(tp=4, fuse_qkv=True),
    "tp8_gqa": Layout(tp=8, config=EIGHT_HEADS),
    "tp8_gqa_multiplier_8": Layout(
        tp=8, kv_size_multiplier=8, config={**EIGHT_HEADS, "num_key_value_heads": 1}
    ),
    "tp2_pp2": Layout(tp=2, pp=2),
    "tp2_pp2_same_ends": Layout(tp=2, pp=2, same_ends=True),
    "tp4_pp2_gqa_plain": Layout(tp=4, pp=2, xser=False),
    "tied": Layout(tp=2, config={"tie_word_embeddings": True}),
    "tied_plain": Layout(tp=2, xser=False, config={"tie_word_embeddings": True}),
    "lora": Layout(tp=2, dtype=torch.bfloat16, targets=EVERY_LINEAR),
    "lora_one": Layout(dtype=torch.bfloat16, targets=EVERY_LINEAR),
    "lora_gqa_plain": Layout(tp=4, xser=False, dtype=torch.bfloat16, targets=EVERY_LINEAR),
    "lora_gqa_fuse_qkv": Layout(tp=4, fuse_qkv=True, dtype=torch.bfloat16, targets=EVERY_LINEAR),
    "lora_attention": Layout(tp=2, dtype=torch.bfloat16, targets=ATTENTION),
}


def write_adapter(layout: Layout, model: Any, folder: Path) -> None:
    """An adapter of peft's. Layers that optimum-neuron fuses have one lora_A: it keeps their mean,
    which is exact for these values."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=24, target_modules=list(layout.targets), task_type="CAUSAL_LM"),
    )
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if ".lora_A." in name and not any(
            f"{follower}.lora_A" in name for follower in ("k_proj", "v_proj", "up_proj")
        ):
            first = torch.randint(-64, 65, parameter.shape) / 256
        if ".lora_A." in name:
            parameter.data.copy_(first)
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape) / 16)
    adapted.save_pretrained(folder)


def names_of_stage(model: Any) -> set[str]:
    """neuronx-distributed's even cut: the embeddings go with the first layers, the norm and the
    head with the last."""
    layers = len(model.get_decoder().layers) // PLACE.pp_size
    mine = [
        f".layers.{number}."
        for number in range(PLACE.pp_rank * layers, (PLACE.pp_rank + 1) * layers)
    ]
    if PLACE.pp_rank == 0:
        mine.append("embed_tokens")
    if PLACE.pp_rank == PLACE.pp_size - 1:
        mine += ["model.norm", "lm_head"]
    return {name for name in model.state_dict() if any(part in name for part in mine)}


def save_rank(layout: Layout, folder: Path) -> None:
    """Load the original as the rank in PLACE, and save it as the trainer would."""
    from optimum.neuron.models.training import TrainingNeuronConfig
    from optimum.neuron.models.training.llama.modeling_llama import LlamaForCausalLM
    from optimum.neuron.peft import NeuronPeftModelForCausalLM

    config = TrainingNeuronConfig(
        tensor_parallel_size=layout.tp,
        pipeline_parallel_size=layout.pp,
        use_xser=layout.xser,
        fuse_qkv=layout.fuse_qkv,
        kv_size_multiplier=layout.kv_size_multiplier,
    )
    model = LlamaForCausalLM.from_pretrained(folder / "original", config, dtype=layout.dtype)
    for name, parameter in model.named_parameters():
        if (
            parameter.is_meta
        ):  # another stage's: a real rank saves it too, with whatever it was made with
            model.get_submodule(name.rpartition(".")[0]).weight = torch.nn.Parameter(
                torch.zeros_like(parameter, device="cpu")
            )
    if layout.targets:
        model = NeuronPeftModelForCausalLM.from_pretrained(
            model, str(folder / "adapter"), is_trainable=True
        )
        if layout.fuse_qkv:
            load_fused_projections(model, folder / "adapter")
    model.save_pretrained(folder / "saved")


def load_fused_projections(model: Any, adapter: Path) -> None:
    """optimum-neuron gives the matrix B of a fused qkv_proj a name that the model does not have,
    and so leaves it at zero."""
    from optimum.neuron.models.training.transformations_utils import (
        CustomModule,
        GQAQKVColumnParallelLinearSpec,
    )

    for name, module in model.named_modules():
        for spec in module.specs if isinstance(module, CustomModule) else ():
            if isinstance(spec, GQAQKVColumnParallelLinearSpec):
                state = spec._lora_adapt_state_dict(
                    name, {}, load_file(adapter / "adapter_model.safetensors"), {}
                )
                module.qkv_proj.lora_B["default"].weight_qkv.data.copy_(
                    state[f"{name}.qkv_proj.lora_B.weight"]
                )


def write(name: str, layout: Layout, folder: Path) -> None:
    from optimum.neuron.models.training.checkpointing import consolidate_model_parallel_checkpoints

    layout.model().save_pretrained(folder / "original")
    if layout.targets:
        write_adapter(layout, layout.model(), folder / "adapter")
    PLACE.tp_size, PLACE.pp_size = layout.tp, layout.pp
    for pp_rank in range(layout.pp):
        for tp_rank in range(layout.tp):
            PLACE.tp_rank, PLACE.pp_rank = tp_rank, pp_rank
            save_rank(layout, folder)
    if layout.targets:
        shutil.copytree(folder / "saved" / "adapter_default" / "adapter_shards", folder / "shards")
        shutil.copy(folder / "saved" / "adapter_default" / "adapter_config.json", folder / "shards")
    else:
        (folder / "saved" / "shards").rename(folder / "shards")
    try:
        read: Any = consolidate_model_parallel_checkpoints(
            folder / "shards", adapter_name="default" if layout.targets else None
        )
    except Exception as error:
        read = repr(error)
    torch.save(read, folder / "library.pt")


def library_query_orders() -> list[dict[str, Any]]:
    """For each size that fits: which query head of the original model is at each place of the
    trained one."""
    from optimum.neuron.models.training.transformations_utils import GQAQKVColumnParallelLinearSpec

    orders = []
    for tp in (1, 2, 4, 6, 8, 16, 32):
        for kv_heads in (1, 2, 3, 4, 6, 8):
            for copies in (
                copies
                for copies in range(1, tp + 1)
                if tp % copies == 0 and kv_heads * copies % tp == 0
            ):
                for heads in (kv_heads * copies * attending for attending in (1, 2, 3)):
                    if heads % tp == 0:
                        ranks = [
                            GQAQKVColumnParallelLinearSpec.compute_query_indices_for_rank(
                                tp, rank, heads, kv_heads, copies
                            ).tolist()
                            for rank in range(tp)
                        ]
                        orders.append(
                            {
                                "tp": tp,
                                "kv_heads": kv_heads,
                                "copies": copies,
                                "heads": heads,
                                "ranks": ranks,
                            }
                        )
    return orders


def library_survivors(shards: Path, output: Path, max_shard_size: int) -> list[str]:
    """The names of the tensors that the library's own writer leaves in `output` when the model
    takes more than one file."""
    from optimum.neuron.models.training import checkpointing

    checkpointing.split_torch_state_dict_into_shards = partial(
        checkpointing.split_torch_state_dict_into_shards, max_shard_size=max_shard_size
    )
    checkpointing.consolidate_model_parallel_checkpoints_to_unified_checkpoint(shards, output)
    return sorted(name for path in output.glob("*.safetensors") for name in load_file(path))


def main(folder: Path) -> None:
    install()
    from optimum.neuron.models.training import modeling_utils

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    modeling_utils.get_pipeline_parameters_for_current_stage = names_of_stage
    import optimum.neuron.peft.peft_model as peft_model

    peft_model.get_pipeline_parameters_for_current_stage = lambda model: set(model.state_dict())
    # loading a model collects garbage, which among all that was imported takes half a second
    gc.freeze()
    for name, layout in LAYOUTS.items():
        (folder / name).mkdir(parents=True)
        write(name, layout, folder / name)
    (folder / "queries.json").write_text(json.dumps(library_query_orders()))
    survivors = library_survivors(folder / "tp2" / "shards", folder / "library_writer", 20_000)
    (folder / "survivors.json").write_text(json.dumps(survivors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
