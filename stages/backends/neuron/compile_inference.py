"""Compiles a Hugging Face folder for NeuronCores: one program with prefill and decode.

Each core's part of the weights is a file next to the program. Compiling needs AWS's packages but no
device, so a cheap machine can compile for an expensive one. Everything that can be refused is
refused before the compiler starts, which takes minutes for a model of 7B parameters.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.backends.neuron import cache
from stages.backends.neuron.arguments import cache_repository
from stages.backends.neuron.check import SCRATCH, TARGETS, inference_problems, machine_problems
from stages.backends.neuron.compiled import (
    PROGRAM,
    missing_files,
    missing_packages,
    read_description,
    weight_files,
)
from stages.model.fit import raw_config
from stages.model.size import weight_bytes
from stages.run.disk import require_space
from stages.run.errors import InputError, StageFailure, refuse
from stages.run.launch import launch
from stages.run.layout import CONFIG_FILE
from stages.run.lock import locked
from stages.run.settings import Settings


def compile_model(model_dir: Path, output: Path, *, settings: Settings) -> dict[str, Any]:
    """Compile the model in `model_dir` into `output`, for INSTANCE_TYPE and the INFERENCE_ sizes.

    Returns the manifest's entries: device and target, sizes, versions, bytes, seconds. Raises
    InputError with everything that keeps the model from being compiled, StageFailure when compiling
    fails or leaves a folder that could not be loaded.
    """
    _refuse_unfit(model_dir, settings)
    output.mkdir(parents=True, exist_ok=True)
    require_space("each core's part of the weights", output, weight_bytes(model_dir))
    scratch = SCRATCH.absolute()
    started = time.monotonic()
    with (
        locked(scratch, "compile-inference"),
        cache.in_use(settings.neuron_compile_cache_url),
    ):
        try:
            launch(
                export_command(model_dir, output, scratch / "error", settings),
                environment(settings, scratch),
                scratch / "error",
            )
        except StageFailure as error:
            raise StageFailure(
                f"{error}\nThe compiler's logs are in {scratch / 'graphs'}. If a process was "
                "killed, memory ran out: lower INFERENCE_SEQUENCE_LENGTH or INFERENCE_BATCH_SIZE, "
                "or compile on a larger machine; it needs no devices."
            ) from error
    seconds = time.monotonic() - started
    entries = _check(output, settings)
    # Kept where compiling failed: the compiler's logs are in it.
    shutil.rmtree(scratch / "graphs", ignore_errors=True)
    return {**entries, "compile_seconds": round(seconds, 1)}


def export_command(
    model_dir: Path, output: Path, error_file: Path, settings: Settings
) -> list[str]:
    """The process that compiles."""
    options = {
        "--model": model_dir.absolute(),
        "--output": output.absolute(),
        "--error-file": error_file,
        "--instance-type": settings.instance_type,
        "--batch-size": settings.inference_batch_size,
        "--sequence-length": settings.inference_sequence_length,
        "--tensor-parallel-size": settings.inference_tensor_parallel_size,
    }
    words = [str(word) for option in options.items() for word in option]
    return [sys.executable, "-m", "stages.backends.neuron.export", *words]


def environment(settings: Settings, scratch: Path) -> dict[str, str]:
    """The variables of that process, besides the caller's.

    The compile cache is named only by its URL: NEURON_CC_FLAGS, with --cache_dir, is for training.
    The Hub is asked for compiled graphs only if CUSTOM_CACHE_REPO names a repository: the public
    one cannot have them, because the key of a graph contains our scratch path.
    """
    repository = cache_repository(settings)
    return {
        "NEURON_COMPILE_CACHE_URL": settings.neuron_compile_cache_url,
        "NEURON_PLATFORM_TARGET_OVERRIDE": TARGETS[settings.instance_type][0],
        "BASE_COMPILE_WORK_DIR": f"{scratch / 'graphs'}/",
        "TOKENIZERS_PARALLELISM": "false",
        # optimum-neuron uses names that transformers calls deprecated.
        "TRANSFORMERS_VERBOSITY": "error",
        **(repository or {"HF_HUB_OFFLINE": "1"}),
    }


def _refuse_unfit(model_dir: Path, settings: Settings) -> None:
    """Raise InputError for all that can be refused before any weight is read."""
    if not (model_dir / CONFIG_FILE).is_file():
        raise InputError(
            f"{model_dir} has no model: {CONFIG_FILE} is missing. Run `make consolidate` first."
        )
    config = json.loads((model_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    problems = [
        *inference_problems(settings, raw_config(config)),
        *machine_problems(settings, {"compile-inference"}),
        *_package_problems(),
    ]
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype != "bfloat16":
        # The compiler takes the dtype from config.json, and float32 would need twice the memory and
        # run at a quarter of the speed.
        problems.append(
            f"config.json in {model_dir} says dtype {dtype}; the neuron backend compiles bfloat16. "
            "Set BF16=1 and consolidate again."
        )
    refuse(problems)


def _package_problems() -> Iterator[str]:
    if missing := missing_packages():
        yield (
            f"Compiling needs AWS's Neuron packages; not installed: {', '.join(missing)}. Run "
            "compile-inference in the Neuron container (docker/run), which has them; it needs no "
            "device for this."
        )


def _check(output: Path, settings: Settings) -> dict[str, Any]:
    """The manifest's entries about the compiled model.

    Raises StageFailure if the model is not what the settings ask for, or could not be loaded.
    """
    size = settings.inference_tensor_parallel_size
    if missing := missing_files(output, size):
        raise StageFailure(
            f"Compiling ended without an error but wrote no {', '.join(missing)}. Nothing was "
            "published. Run it again."
        )
    description = read_description(output)
    expected = {
        "target": TARGETS[settings.instance_type][0],
        "batch_size": settings.inference_batch_size,
        "sequence_length": settings.inference_sequence_length,
        "tp_degree": size,
        "torch_dtype": "bfloat16",
        "on_device_sampling": False,
        # With an id, loading would fetch weights that the folder lacks from the Hub.
        "checkpoint_id": None,
    }
    differences = [
        f"{name} {description.get(name)}, not {value}"
        for name, value in expected.items()
        if description.get(name) != value
    ]
    if differences:
        raise StageFailure(
            f"The compiled model is not what the settings ask for: {'; '.join(differences)}. "
            "Nothing was published."
        )
    return {
        "device": settings.instance_type,
        "target": description["target"],
        "dtype": description["torch_dtype"],
        "batch_size": description["batch_size"],
        "sequence_length": description["sequence_length"],
        "tensor_parallel_size": size,
        "optimum_neuron": description["optimum_neuron_version"],
        "neuronx_cc": description["neuronxcc_version"],
        "package_bytes": (output / PROGRAM).stat().st_size,
        "weight_bytes": sum((output / name).stat().st_size for name in weight_files(size)),
    }
