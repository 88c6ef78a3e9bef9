"""LoRA (Hu et al. 2021, arXiv:2106.09685): frozen linear layers with low-rank updates that are
trained, under the names and with the initial weights that peft gives them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from stages.backends.decoding import seed_of
from stages.backends.torch.checkpoint import PARTIAL, trained_weights
from stages.run.settings import Settings

BASE_LAYER = ".base_layer"  # in the name of a frozen weight; its file does not have it


class BitDropout(torch.nn.Dropout):
    """torch's dropout, whose mask on a CPU is of 16 random bits an element: `p` is rounded to them.

    torch draws a number for each element, which takes a quarter of a step of SmolLM2.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        here = x.device.type == "cpu" and not isinstance(x, DTensor)
        if not (self.training and self.p and here) or is_compiling():
            return super().forward(x)
        lowest = torch.iinfo(torch.int16).min
        numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        bits = numbers.random_(torch.iinfo(torch.int64).min, None).view(torch.int16)
        kept = bits[: x.numel()].view(x.shape) >= min(lowest + round(self.p * 2**16), -lowest - 1)
        return x * kept.to(x.dtype).div_(1 - self.p)


class LoraLinear(torch.nn.Module):
    """base(x) + LORA_ALPHA / LORA_R * B(A(dropout(x))); A is [rank, in], B [out, rank]."""

    def __init__(self, base: torch.nn.Linear, settings: Settings):
        super().__init__()
        self.base_layer = base
        self.lora_A = torch.nn.Linear(
            base.in_features, settings.lora_r, bias=False, dtype=torch.float32
        )
        self.lora_B = torch.nn.Linear(
            settings.lora_r, base.out_features, bias=False, dtype=torch.float32
        )
        self.dropout = BitDropout(settings.lora_dropout)
        self.scale = settings.lora_alpha / settings.lora_r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        # What comes from A is small: scaling it costs nothing.
        return self.base_layer(x) + self.lora_B(self.lora_A(self.dropout(x)) * self.scale)


def add_adapters(model: Any, settings: Settings) -> None:
    """Give the layers of LORA_TARGET_MODULES an adapter."""
    for name in settings.lora_target_modules.split():
        for path, module in list(model.named_modules()):
            if path.endswith(f".{name}") and isinstance(module, torch.nn.Linear):
                parent, _, own = path.rpartition(".")
                setattr(model.get_submodule(parent), own, LoraLinear(module, settings))


def freeze(model: torch.nn.Module) -> None:
    """Let nothing but the adapters be trained. This comes after the layers are split, which makes
    new parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def adapted_plan(name: str, style: ParallelStyle) -> dict[str, ParallelStyle]:
    """How the parts of a layer with an adapter are split: the frozen one by `style`, A and B too.

    The rank is small, so that what passes from A to B is whole on every rank.
    """
    by_columns = isinstance(style, ColwiseParallel)
    first = ColwiseParallel if by_columns else RowwiseParallel
    return {
        f"{name}{BASE_LAYER}": style,
        f"{name}.lora_A": first(output_layouts=Replicate()),
        f"{name}.lora_B": ColwiseParallel(output_layouts=Shard(-1 if by_columns else 1)),
    }


def initialise(model: torch.nn.Module, settings: Settings) -> None:
    """Give A peft's random weights and B zeros: the first step begins at the base model.

    The numbers follow from SEED and the layer's name, so that they are the same on any layout.
    """
    weights: dict[str, Any] = {}
    for name, parameter in trained_weights(model).items():
        whole = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(seed_of(settings.seed, name))
            torch.nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        weights[name] = whole
    set_model_state_dict(model, weights, options=replace(PARTIAL, full_state_dict=True))


def adapter_config(settings: Settings) -> dict[str, Any]:
    """adapter_config.json as peft has it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # the one that the user has, wherever it lies
        "r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": sorted(set(settings.lora_target_modules.split())),
        "bias": "none",
        "inference_mode": True,
    }
