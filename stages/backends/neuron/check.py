"""What the neuron backend refuses, from the settings and the model's config.json.

Standard library only, so that make can ask before anything runs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from stages.backends.neuron.hardware import find_hardware
from stages.backends.neuron.parallel_sizes import topology_problems
from stages.model.fit import (
    architecture_problems,
    fit_problems,
    position_problems,
    quantize_problems,
    rope_problems,
    window_problems,
)
from stages.run.settings import Settings

# For these optimum-neuron computes RoPE for heads of hidden_size / num_attention_heads, whatever
# head_dim config.json has (models/inference/llama).
HEADS_OF_HIDDEN_SIZE = ("granite", "llama")

# INSTANCE_TYPE -> the compiler's name for it, and the NeuronCores of the largest instance (trn2:
# logical cores, of two physical ones each).
TARGETS = {"trn1": ("trn1", 32), "trn1n": ("trn1", 32), "inf2": ("trn1", 24), "trn2": ("trn2", 64)}

# The folder of graphs and NEFFs while they are compiled. The path of the compiler's log file, which
# is in this folder, is part of the key of a graph in the compile cache (neuronx-distributed,
# trace/model_builder.py: get_hash_module), so the path must be the same in every run.
# neuronx-distributed empties the folder first; its default, /tmp/nxd_model, is shared by all users.
SCRATCH = Path("outputs/.cache/compiler")


def training_problems(settings: Settings, config: Any, vocabulary: int) -> Iterator[str]:
    """Everything that keeps the model of `config` from being trained with these settings.

    `vocabulary` is the number of ids that the tokenizer can give, 0 where it is not known yet.
    """
    yield from topology_problems(settings, config)
    yield from fit_problems(settings, config, vocabulary)
    if not settings.bf16:
        yield "BF16=0: the neuron backend trains and compiles only bfloat16. Set BF16=1."
    if settings.resume == "weights" and settings.lora_r:
        yield (
            f"RESUME=weights: LORA_R={settings.lora_r} saves adapters, from which no training can "
            "continue. Set RESUME=restart."
        )
    if settings.torch_compile:
        yield "TORCH_COMPILE=1: on Neuron neuronx-cc compiles, not inductor. Set TORCH_COMPILE=0."
    if settings.rehearse and settings.lora_r:
        yield (
            f"LORA_R={settings.lora_r} cannot be rehearsed here: optimum-neuron's adapters begin "
            "with other random numbers than the reference's. Rehearse with BACKEND=torch or "
            "LORA_R=0, or leave REHEARSE 0."
        )
    if settings.rehearse and settings.pipeline_parallel_size > 1:
        yield (
            f"PIPELINE_PARALLEL_SIZE={settings.pipeline_parallel_size} cannot be rehearsed: in a "
            "pipeline every micro-batch weighs the same, in the reference every token does. "
            "Rehearse with PIPELINE_PARALLEL_SIZE=1, or leave REHEARSE 0."
        )


def inference_problems(settings: Settings, config: Any) -> Iterator[str]:
    """Everything that keeps the model of `config` from being compiled with these settings.

    Heads, columns and hidden size need not be multiples of the number of cores: optimum-neuron pads
    them (modules/attention/gqa.py).
    """
    yield from architecture_problems(settings, config, "neuron")
    yield from quantize_problems(settings)
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None)
    if config.model_type in HEADS_OF_HIDDEN_SIZE and head_dim and head_dim * heads != hidden:
        yield (
            f"The model's {heads} heads of {head_dim} are not its hidden size {hidden}: "
            f"optimum-neuron cannot compile such a {config.model_type}. Choose another model."
        )
    yield from rope_problems(config)
    length = settings.inference_sequence_length
    yield from position_problems("INFERENCE_SEQUENCE_LENGTH", length, config)
    yield from window_problems("INFERENCE_SEQUENCE_LENGTH", length, config)
    size, vocabulary = settings.inference_tensor_parallel_size, config.vocab_size
    _, cores = TARGETS[settings.instance_type]
    if size > cores:
        yield (
            f"INFERENCE_TENSOR_PARALLEL_SIZE={size} is above the {cores} NeuronCores of the "
            f"largest {settings.instance_type}. Set at most {cores}."
        )
    if vocabulary % size:
        # Padded too, but where logits are returned the mask of the padding covers real ids
        # (modules/decoder/modeling_decoder.py).
        yield (
            f"INFERENCE_TENSOR_PARALLEL_SIZE={size} does not divide the model's {vocabulary} "
            "vocabulary entries. Set a divisor of that number."
        )


def machine_problems(settings: Settings, stages: Collection[str]) -> Iterator[str]:
    """What this machine lacks to run `stages`."""
    machine = find_hardware()
    if {"precompile", "train"} & set(stages) and not machine.cores:
        yield (
            f"No NeuronCores here: {machine.source}. Run on a trn1 or trn2 instance, or set "
            "BACKEND=torch to rehearse on this machine."
        )
    if "compile-inference" in stages and (
        separator := re.search(r"[^\w./+-]", str(SCRATCH.absolute()), re.ASCII)
    ):
        yield (
            f"{SCRATCH.absolute()}: the compiler's command line is split at {separator[0]!r} in a "
            "path. Move the project to a path without it."
        )
