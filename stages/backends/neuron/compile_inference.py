"""From a Hugging Face folder to a model compiled for NeuronCores: one program with prefill and decode, and each core's weights.

Compiling needs AWS's packages but no device: a cheap machine can do it for a dear one. Everything that can be refused is refused
before the compiler starts, which takes minutes for a model of 7B parameters.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.backends.neuron.compiled import (
    PROGRAM,
    missing_files,
    missing_packages,
    read_description,
    weight_files,
)
from stages.model.size import weight_bytes
from stages.run.disk import require_space
from stages.run.errors import InputError, StageFailure
from stages.run.launch import launch
from stages.run.layout import CONFIG_FILE
from stages.run.lock import locked
from stages.run.settings import Settings

# What training on Neuron gives and optimum-neuron's inference takes (models/inference/auto_models.py).
SUPPORTED = ("granite", "llama", "qwen3")
# These compute RoPE for heads of hidden_size / num_attention_heads, whatever config.json says of head_dim (models/inference/llama).
HEADS_OF_HIDDEN_SIZE = ("granite", "llama")
# RoPE whose frequencies vary with the length: a graph with fixed constants cannot compute it.
ROPE_OF_VARYING_FREQUENCY = ("dynamic", "longrope")

# INSTANCE_TYPE -> what the compiler calls it, and NeuronCores of the largest instance (trn2: logical cores, of two each).
TARGETS = {"trn1": ("trn1", 32), "trn1n": ("trn1", 32), "inf2": ("trn1", 24), "trn2": ("trn2", 64)}

# Where graphs and NEFFs lie while they are compiled. The compiler's log file, and with it this path, is part of the key by which a
# graph is found in the compile cache (neuronx-distributed, trace/model_builder.py: get_hash_module), so that the path must stay the
# same from run to run. neuronx-distributed empties it first; its default, /tmp/nxd_model, is everybody's.
SCRATCH = Path("outputs/.cache/compiler")


def compile_model(model_dir: Path, output: Path, *, settings: Settings) -> dict[str, Any]:
    """Compile the model in `model_dir` into `output` for INSTANCE_TYPE, at the sizes that the INFERENCE_ settings give.

    Returns the facts for the manifest: device and target, sizes, versions, bytes, seconds. Raises InputError with everything that
    keeps it from being compiled, StageFailure when compiling fails or leaves a folder that could not be loaded.
    """
    _refuse_unfit(model_dir, settings)
    output.mkdir(parents=True, exist_ok=True)
    require_space("each core's part of the weights", output, weight_bytes(model_dir))
    scratch = SCRATCH.absolute()
    started = time.monotonic()
    with locked(scratch, "compile-inference"):
        try:
            launch(
                export_command(model_dir, output, scratch / "error", settings),
                environment(settings, scratch),
                scratch / "error",
            )
        except StageFailure as error:
            raise StageFailure(
                f"{error}\nThe compiler's logs are in {scratch / 'graphs'}. Where something was killed, memory ran out: lower "
                "INFERENCE_SEQUENCE_LENGTH or INFERENCE_BATCH_SIZE, or compile on a larger machine; it needs no devices."
            ) from error
    seconds = time.monotonic() - started
    facts = _check(output, settings)
    shutil.rmtree(
        scratch / "graphs", ignore_errors=True
    )  # kept where compiling failed: the compiler's logs lie there
    return {**facts, "compile_seconds": round(seconds, 1)}


def export_command(
    model_dir: Path, output: Path, error_file: Path, settings: Settings
) -> list[str]:
    """The process that compiles."""
    command = [
        sys.executable,
        "-m",
        "stages.backends.neuron.export",
        "--model",
        str(model_dir.absolute()),
        "--output",
    ]
    command += [
        str(output.absolute()),
        "--error-file",
        str(error_file),
        "--instance-type",
        settings.instance_type,
    ]
    command += [
        "--batch-size",
        str(settings.inference_batch_size),
        "--sequence-length",
        str(settings.inference_sequence_length),
    ]
    return [*command, "--tensor-parallel-size", str(settings.inference_tensor_parallel_size)]


def environment(settings: Settings, scratch: Path) -> dict[str, str]:
    """What that process gets besides the caller's environment.

    The compile cache as a URL alone: --cache_dir in NEURON_CC_FLAGS, and the flags there, are for training. The Hub is asked for
    compiled graphs where CUSTOM_CACHE_REPO names a repository: everybody's holds none under the scratch space's path.
    """
    given = {
        "NEURON_COMPILE_CACHE_URL": settings.neuron_compile_cache_url,
        "NEURON_PLATFORM_TARGET_OVERRIDE": TARGETS[settings.instance_type][0],
        "BASE_COMPILE_WORK_DIR": f"{scratch / 'graphs'}/",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",  # optimum-neuron uses names that transformers calls deprecated
    }
    return (
        {**given, "CUSTOM_CACHE_REPO": settings.custom_cache_repo}
        if settings.custom_cache_repo
        else {**given, "HF_HUB_OFFLINE": "1"}
    )


def _refuse_unfit(model_dir: Path, settings: Settings) -> None:
    """Everything that can be refused before a byte of weights is read."""
    if not (model_dir / CONFIG_FILE).is_file():
        raise InputError(
            f"{model_dir} holds no model (config.json is missing): run `make consolidate` first"
        )
    config = json.loads((model_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    problems = [
        *_model_problems(model_dir, config),
        *_size_problems(settings, config),
        *_machine_problems(),
    ]
    if problems:
        raise InputError(problems)


def compile_problems(settings: Settings, config: Any) -> Iterator[str]:
    """What will keep the base model of `config` from being compiled, once it is trained: known before that is paid for."""
    values = {**config.to_dict(), "dtype": "bfloat16"}  # that of what is trained
    yield from _model_problems(Path(settings.model_id), values)
    yield from _size_problems(settings, values)


def _model_problems(model_dir: Path, config: dict[str, Any]) -> Iterator[str]:
    model_type, dtype = config.get("model_type"), config.get("dtype", config.get("torch_dtype"))
    if model_type not in SUPPORTED:
        yield f'{model_dir} holds a model of type "{model_type}"; the neuron backend compiles {", ".join(SUPPORTED)}'
    if dtype != "bfloat16":
        # The compiler takes the dtype from here, and float32 would need twice the memory at a quarter of the speed.
        yield f"config.json in {model_dir} says dtype {dtype}: the neuron backend compiles bfloat16. Set BF16=1 and consolidate again"
    heads, hidden, head_dim = (
        config.get("num_attention_heads"),
        config.get("hidden_size"),
        config.get("head_dim"),
    )
    if model_type in HEADS_OF_HIDDEN_SIZE and head_dim and heads and head_dim * heads != hidden:
        yield f"the model's {heads} heads of {head_dim} are not its hidden size {hidden}: optimum-neuron compiles no such {model_type}"
    rope = config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type in ROPE_OF_VARYING_FREQUENCY:
        yield f'the model\'s RoPE is of type "{rope_type}", whose frequencies vary with the length: it cannot be compiled ahead of time'


def _size_problems(settings: Settings, config: dict[str, Any]) -> Iterator[str]:
    """Heads, columns and hidden size need not be multiples of the cores: optimum-neuron pads them (modules/attention/gqa.py)."""
    length, positions = settings.inference_sequence_length, config.get("max_position_embeddings")
    if positions and length > positions:
        yield f"INFERENCE_SEQUENCE_LENGTH={length} tokens is above the model's {positions} positions. Give at most {positions}"
    size, vocabulary = settings.inference_tensor_parallel_size, config.get("vocab_size", 0)
    _, cores = TARGETS[settings.instance_type]
    if size > cores:
        yield (
            f"INFERENCE_TENSOR_PARALLEL_SIZE={size} is above the {cores} NeuronCores of the largest "
            f"{settings.instance_type}. Give at most {cores}"
        )
    if vocabulary % size:
        # Padded too, but where logits are returned the padding's mask falls on real ids (modules/decoder/modeling_decoder.py).
        yield f"INFERENCE_TENSOR_PARALLEL_SIZE={size} does not divide the model's {vocabulary} vocabulary entries. Set a divisor of it"


def _machine_problems() -> Iterator[str]:
    if missing := missing_packages():
        yield (
            f"compiling needs AWS's Neuron packages; not installed: {', '.join(missing)}. Run compile-inference in the Neuron "
            "container (docker/run): it brings them, and needs no device for this"
        )
    if apart := re.search(r"[^\w./+-]", str(SCRATCH.absolute()), re.ASCII):
        yield f"{SCRATCH.absolute()}: the compiler's command line is taken apart at {apart[0]!r} in a path. Move the project"


def _check(output: Path, settings: Settings) -> dict[str, Any]:
    """The facts of what was compiled; StageFailure where it is not what was asked for, or could not be loaded."""
    size = settings.inference_tensor_parallel_size
    if missing := missing_files(output, size):
        raise StageFailure(
            f"Compiling ended well but left no {', '.join(missing)}. Nothing was published. Run it again."
        )
    written = read_description(output)
    asked = {
        "target": TARGETS[settings.instance_type][0],
        "batch_size": settings.inference_batch_size,
        "sequence_length": settings.inference_sequence_length,
        "tp_degree": size,
        "torch_dtype": "bfloat16",
        "on_device_sampling": False,
        "checkpoint_id": None,  # else loading would fetch weights from there when it misses its own
    }
    if wrong := [
        f"{name} {written.get(name)}, not {value}"
        for name, value in asked.items()
        if written.get(name) != value
    ]:
        raise StageFailure(
            f"The compiled model is not what was asked for: {'; '.join(wrong)}. Nothing was published."
        )
    return {
        "device": settings.instance_type,
        "target": written["target"],
        "dtype": written["torch_dtype"],
        "batch_size": written["batch_size"],
        "sequence_length": written["sequence_length"],
        "tensor_parallel_size": size,
        "optimum_neuron": written["optimum_neuron_version"],
        "neuronx_cc": written["neuronxcc_version"],
        "package_bytes": (output / PROGRAM).stat().st_size,
        "weight_bytes": sum((output / name).stat().st_size for name in weight_files(size)),
    }
