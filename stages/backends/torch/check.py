"""What the torch backend refuses, from the settings and the model's config.json.

Standard library only, so that make can ask before anything runs.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from typing import Any

from stages.backends.neuron import hardware
from stages.make.install import NVIDIA_DEVICES
from stages.model.fit import (
    LORA_LAYERS,
    architecture_problems,
    fit_problems,
    lora_layer_problems,
    not_divisible,
    position_problems,
    quantize_problems,
    rope_problems,
)
from stages.run.backend import choose
from stages.run.settings import Settings

# transformers has the matrices of these in a form that tensor parallelism cannot divide: joined
# (phi3), or with a norm across all heads (olmo2).
UNDIVIDED = ("olmo2", "phi3")
JOINED_LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")  # phi3's linear layers
SHORTEST_SEQUENCE = 16
NATIVE = "2.13.3."  # the releases of torch-neuronx for the pinned PyTorch
ON_DEVICE = {"precompile", "train", "compile-inference", "eval"}


def training_problems(settings: Settings, config: Any, vocabulary: int) -> Iterator[str]:
    """Everything that keeps the model of `config` from being trained with these settings.

    `vocabulary` is the number of ids that the tokenizer can give, 0 where it is not known yet.
    """
    unknown = list(architecture_problems(settings, config, "torch"))
    yield from unknown or _division_problems(settings, config)
    yield from fit_problems(settings, config, vocabulary)
    if settings.pipeline_parallel_size > 1:
        yield (
            f"PIPELINE_PARALLEL_SIZE={settings.pipeline_parallel_size}: the torch backend has no "
            "pipeline. Leave it 1."
        )
    if settings.lora_r:
        yield from _lora_problems(settings, config)
    if not settings.zero_1:
        yield "ZERO_1=0: the torch backend always shards the optimizer (FSDP2). Leave ZERO_1=1."


def _lora_problems(settings: Settings, config: Any) -> Iterator[str]:
    """A message for layers that have no adapter, and for a rank that cannot be divided."""
    layers = JOINED_LAYERS if config.model_type == "phi3" else LORA_LAYERS
    yield from lora_layer_problems(settings, layers)
    if settings.lora_r < settings.tensor_parallel_size:
        yield (
            f"LORA_R={settings.lora_r} is below TENSOR_PARALLEL_SIZE="
            f"{settings.tensor_parallel_size}, which divides it. Raise it, or lower that."
        )


def _division_problems(settings: Settings, config: Any) -> Iterator[str]:
    """A message when tensor parallelism cannot divide the layers among its processes.

    The vocabulary need not be divisible: DTensor gives the last process fewer rows.
    """
    size, kv_heads = settings.tensor_parallel_size, config.num_key_value_heads
    counts = not_divisible(size, config)
    if kv_heads and kv_heads % size:
        counts.append(f"{kv_heads} KV heads")
    if size > 1 and config.model_type in UNDIVIDED:
        yield (
            f"TENSOR_PARALLEL_SIZE={size}: the layers of a {config.model_type} cannot be divided. "
            "Set 1; data parallelism divides its optimizer too."
        )
    elif counts:
        yield (
            f"TENSOR_PARALLEL_SIZE={size} does not divide the model's {', '.join(counts)}. Set a "
            "divisor of each."
        )


def inference_problems(settings: Settings, config: Any) -> Iterator[str]:
    """Everything that keeps the model of `config` from being compiled with these settings."""
    length = settings.inference_sequence_length
    yield from architecture_problems(settings, config, "torch")
    if length < SHORTEST_SEQUENCE:
        yield (
            f"INFERENCE_SEQUENCE_LENGTH={length} tokens, prompt and answer together, is too short. "
            f"Set at least {SHORTEST_SEQUENCE}."
        )
    yield from position_problems("INFERENCE_SEQUENCE_LENGTH", length, config)
    yield from rope_problems(config)
    yield from quantize_problems(settings)


def machine_problems(settings: Settings, stages: Collection[str]) -> Iterator[str]:
    """What this machine lacks to run `stages`."""
    if set(stages) & ON_DEVICE and (problem := device_problem(settings)):
        yield problem
    compiler, needed = cpp_compiler(), not choose(settings).on_neuron  # which has no inductor
    if "compile-inference" in stages and needed and shutil.which(compiler) is None:
        yield (
            f"The C++ compiler {compiler} is not on the PATH. Install it (Debian, Ubuntu: apt "
            "install g++) or name another in CXX."
        )


def device_problem(settings: Settings) -> str:
    """Why the device that DEVICE names, or the Trainium that is here, cannot be used; empty if it
    can, as far as any Python knows."""
    if choose(settings).on_neuron:
        # Not neuron-ls first: every rank asks.
        if not (hardware.device_nodes() or hardware.find_hardware().cores):
            return "DEVICE=neuron: there is no Neuron device here. Set cpu, or auto."
        if settings.neuron_compile_cache_url.startswith("s3:"):
            return (
                f"NEURON_COMPILE_CACHE_URL={settings.neuron_compile_cache_url}: this compiler "
                "keeps its graphs in a folder. Set one that all machines mount."
            )
    if settings.device == "cuda" and not any(map(os.path.exists, NVIDIA_DEVICES)):
        return "DEVICE=cuda: there is no NVIDIA GPU here. Set cpu, or auto."
    return ""


def native_problem() -> str:
    """Why AWS's native PyTorch cannot run in this Python; empty if it can."""
    # It has a device of its own, and the name of the XLA package, which has none.
    try:
        version = importlib.metadata.version("torch-neuronx")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version.startswith(NATIVE):
        return ""
    found = f"torch-neuronx {version} is installed" if version else "it is not installed"
    return (
        f"Trainium 2 and 3 need AWS's native PyTorch, torch-neuronx {NATIVE}*, and {found}. "
        "Install docker/native-requirements.txt as docs/trainium2.md says, or set DEVICE=cpu."
    )


def cpp_compiler() -> str:
    """The C++ compiler that inductor calls: CXX, or its default."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
