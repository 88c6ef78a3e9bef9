"""Compiled generation without AOTInductor: torch.compile's graphs of fixed shapes, for Trainium 2
and 3.

There is a graph for decode and one for each of a few lengths of prompts; a prompt is padded to the
next. Nothing but the weights is packaged: the compiled code is in the compiler's cache, which
compile-inference fills and eval finds, or fills again.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from stages.backends.device import Device
from stages.backends.torch.export import Step, export_step
from stages.backends.torch.generate import CompiledModel, StepName, load
from stages.model.check import pretrained_config
from stages.run.layout import CONFIG_FILE
from stages.run.progress import Progress

SHORTEST = 128  # tokens; each longer graph takes twice as many


def prefill_lengths(sequence_length: int) -> list[int]:
    """The lengths of prompts, ascending, that have a graph: doubling from SHORTEST, and the
    longest that leaves room for an answer."""
    longest = max(2, sequence_length - 1)
    lengths = [SHORTEST << n for n in range(longest.bit_length()) if SHORTEST << n < longest]
    return [*lengths, longest]


def static_steps(
    compiled: Path, description: dict[str, Any], weights: dict[str, torch.Tensor], device: Device
) -> dict[StepName, Any]:
    """Prefill and decode as `generate.Step`s, compiled when they are first called."""
    os.environ.update(device.environment())
    model = _model(compiled, weights, device)
    sizes = description["batch_size"], description["sequence_length"]
    graphs: dict[int, Any] = {}

    def step(name: StepName, length: int | None) -> Any:
        key = length or 0
        if key not in graphs:
            program = export_step(name, model, *sizes, prompt_length=length)
            graphs[key] = device.compiled(program.module())
        return graphs[key]

    @torch.inference_mode()
    def prefill(ids: torch.Tensor, lengths: torch.Tensor, cache: list[torch.Tensor]) -> Any:
        return step("prefill", ids.shape[1])(ids, lengths, cache)

    @torch.inference_mode()
    def decode(ids: torch.Tensor, positions: torch.Tensor, cache: list[torch.Tensor]) -> Any:
        return step("decode", None)(ids, positions, cache)

    return {"prefill": prefill, "decode": decode}


def compile_static(model_dir: Path, compiled: Path, device: Device) -> None:
    """Fill the compiler's cache with every graph of the model in `model_dir`, whose weights are in
    `compiled` too."""
    shutil.copy(model_dir / CONFIG_FILE, compiled)
    model: CompiledModel = load(compiled)
    lengths = prefill_lengths(model.sequence_length)
    print(
        f"compiling decode and prefill of {', '.join(map(str, lengths))} tokens for "
        f"{device.instructions().name}",
        flush=True,
    )
    with Progress("compile-inference", len(lengths) + 1, "graphs") as progress:
        for length in reversed(lengths):
            cache = model.new_cache()
            logits, positions = model.prefill([[0] * length], cache)
            progress.update(1)
        model.decode_one_token(logits.argmax(-1), positions, cache)
        progress.update(1)


def _model(compiled: Path, weights: dict[str, torch.Tensor], device: Device) -> Any:
    """transformers' model of the config.json in `compiled`, with these parameters and buffers."""
    from transformers import AutoModelForCausalLM

    config = pretrained_config(compiled)
    model = AutoModelForCausalLM.from_config(
        config, dtype=config.dtype, attn_implementation="sdpa", trust_remote_code=False
    )
    step = Step(model.to(device.torch_device()).eval().requires_grad_(False))
    with torch.no_grad():
        for name, tensor in (*step.named_parameters(), *step.named_buffers()):
            tensor.copy_(weights[name])
    return model
