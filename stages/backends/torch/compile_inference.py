"""Compiles a Hugging Face folder: two AOTInductor packages (prefill, decode) that share weights.

The packages contain only code, 2 MB each for a few layers and 5 MB for 30; the weights and a
description are files next to them, and generate.py loads the folder without transformers. The
folder is published only after the model, loaded as eval will load it, has given the logits of the
eager model.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.backends.device import Device, device_of
from stages.backends.torch import package_cache
from stages.backends.torch.check import inference_problems, machine_problems
from stages.backends.torch.check_compiled import (
    TOLERANCE,
    Probe,
    check_compiled,
    eager_logits,
    random_probe,
)
from stages.backends.torch.compilers import compilers, run_compilers
from stages.backends.torch.export import Step, export_step, head_dim
from stages.backends.torch.generate import (
    COMPILED_INFO,
    STEPS,
    WEIGHTS,
    StepName,
    constant_type,
)
from stages.backends.torch.inductor import compiler_knows_instructions
from stages.backends.torch.int8 import quantise
from stages.backends.torch.static import compile_static
from stages.model.fit import raw_config
from stages.model.size import weight_bytes
from stages.run.disk import disk_failure, disk_guard
from stages.run.errors import InputError, StageFailure, refuse
from stages.run.host import peak_resident
from stages.run.layout import CONFIG_FILE
from stages.run.settings import Settings


@dataclass(frozen=True)
class Compilation:
    """What is compiled, into which folder, for which device and sizes."""

    model_dir: Path
    output: Path
    device: Device
    batch_size: int
    sequence_length: int
    quantize: str = "none"


def compile_model(model_dir: Path, output: Path, *, settings: Settings) -> dict[str, Any]:
    """Compile the model in `model_dir` into `output`.

    The compiled model takes INFERENCE_BATCH_SIZE prompts of INFERENCE_SEQUENCE_LENGTH tokens each,
    answers included. It has the dtype that config.json names. Returns the manifest's entries:
    device, differences found by the check, bytes. Raises InputError for a model or sizes
    that cannot be compiled, StageFailure when compiling fails or the compiled logits differ from
    the eager model's.
    """
    work = Compilation(
        model_dir,
        output,
        device_of(settings),
        settings.inference_batch_size,
        settings.inference_sequence_length,
        settings.quantize,
    )
    config = _checked_config(work, settings)
    output.mkdir(parents=True, exist_ok=True)
    probe = random_probe(
        vocab_size=config["vocab_size"],
        batch_size=work.batch_size,
        sequence_length=work.sequence_length,
    )
    if work.device.has_inductor:
        found = _package(work, probe, config)
    else:
        expected = _write_model(work, probe)
        compile_static(model_dir, output, work.device)
        found = check_compiled(output, probe, expected)
    return {
        "device": work.device.name,
        "batch_size": work.batch_size,
        "sequence_length": work.sequence_length,
        "quantize": work.quantize,
        **found,
        "package_bytes": sum(file.stat().st_size for file in output.glob("*.pt2")),
        "weight_bytes": (output / WEIGHTS).stat().st_size,
    }


def _checked_config(work: Compilation, settings: Settings) -> dict[str, Any]:
    """config.json; raises InputError for all that can be refused before any weight is read."""
    if not (work.model_dir / CONFIG_FILE).is_file():
        raise InputError(
            f"{work.model_dir} has no model: {CONFIG_FILE} is missing. "
            "Run `make consolidate` first."
        )
    config = json.loads((work.model_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    refuse(
        [
            *inference_problems(settings, raw_config(config)),
            *machine_problems(settings, {"compile-inference"}),
            *filter(None, [work.device.inference_problem()]),
        ]
    )
    return config


def _load_model(work: Compilation) -> Any:
    """The eager model in its dtype, with int8 weights where QUANTIZE asks for them.

    Built in that dtype, not converted: RoPE stays float32.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        work.model_dir,
        dtype="auto",
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model, report = loaded
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:5])
        raise InputError(
            f"{work.model_dir} lacks {len(report['missing_keys'])} of its weights ({missing}). "
            "Run `make consolidate` again."
        )
    if model.dtype not in TOLERANCE:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in TOLERANCE)
        raise InputError(
            f"{work.model_dir} has weights of {model.dtype}; the torch backend compiles {names}."
        )
    model = model.to(work.device.torch_device()).eval().requires_grad_(False)
    return quantise(model) if work.quantize == "int8" else model


def _write_model(work: Compilation, probe: Probe) -> torch.Tensor:
    """Write everything but the packages; returns the eager model's logits (see `eager_logits`).

    The eager model is freed when this returns: on a GPU compiling needs its memory.
    """
    from safetensors.torch import save_file

    model = _load_model(work)
    step = Step(model)
    constants = {**dict(step.named_parameters()), **dict(step.named_buffers())}
    description = _description(work, model, constants)
    (work.output / COMPILED_INFO).write_text(
        json.dumps(description, indent=2) + "\n", encoding="utf-8"
    )
    with disk_guard("the compiled model's weights", work.output, weight_bytes(work.model_dir)):
        save_file(
            {name: tensor.contiguous() for name, tensor in constants.items()}, work.output / WEIGHTS
        )
    # safetensors makes files that only their owner can read.
    shutil.copymode(work.output / COMPILED_INFO, work.output / WEIGHTS)
    return eager_logits(model, probe)


def _description(
    work: Compilation, model: Any, constants: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """compiled.json: what generate.py must know of the model, and what the packages assume."""
    config, ids = model.config, model.generation_config
    return {
        "model_type": config.model_type,
        "device": work.device.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": work.batch_size,
        "sequence_length": work.sequence_length,
        "vocab_size": config.vocab_size,
        "layers": config.num_hidden_layers,
        "cache_shape": [
            work.batch_size,
            config.num_key_value_heads,
            work.sequence_length,
            head_dim(model),
        ],
        "bos_token_id": ids.bos_token_id,
        "eos_token_id": ids.eos_token_id,
        "pad_token_id": ids.pad_token_id,
        "torch": torch.__version__,
        "instruction_set": work.device.instructions().as_json(),
        "constants": {name: constant_type(tensor) for name, tensor in sorted(constants.items())},
    }


def _package(work: Compilation, probe: Probe, config: dict[str, Any]) -> dict[str, Any]:
    """Write the model and its packages, which another model of its shape may have left.

    Returns what the check finds, `packages_kept` where there were such, and the memory that
    compiling took.
    """
    place = package_cache.place_of(
        config,
        work.batch_size,
        work.sequence_length,
        work.quantize,
        work.device.name,
        work.device.instructions().as_json(),
    )
    if package_cache.take(place, work.output):
        print(f"packages of this shape were compiled before: {place}", flush=True)
        expected = _write_model(work, probe)
        return {**check_compiled(work.output, probe, expected), "packages_kept": True}
    with compilers(work.output, work.device):
        expected = _write_model(work, probe)
        peak = _compile_packages(work)
    differences = check_compiled(work.output, probe, expected)
    package_cache.keep(place, work.output)
    return {**differences, "packages_kept": False, "peak_memory_bytes": peak}


def _compile_packages(work: Compilation) -> int:
    """Compile prefill and decode, each in a separate process; returns the most bytes that one of
    them, or the stage before them, had in memory.

    On a CPU both run at the same time, which takes two thirds of the time on two cores. On a GPU
    they run one after the other, because each has a copy of the weights.
    """
    work.device.release_memory()  # the eager model's, for the process that compiles
    prompts = f"{work.batch_size} prompt{'s' * (work.batch_size > 1)}"
    print(
        f"compiling {' and '.join(STEPS)} for {work.device.instructions().name}, "
        f"{prompts} of up to {work.sequence_length} tokens",
        flush=True,
    )
    at_once = len(STEPS) if work.device.memory() is None else 1
    peaks = run_compilers(_compile_step, [(step, work) for step in STEPS], at_once)
    return max(peak_resident() or 0, *peaks)


def _compile_step(step: StepName, work: Compilation) -> int:
    """Write {step}.pt2; returns the bytes in memory at the peak. Runs in a separate process."""
    # The two processes' progress bars for loading weights would overwrite each other.
    os.environ["TQDM_DISABLE"] = "1"
    try:
        from torch._inductor import aoti_compile_and_package

        with warnings.catch_warnings():
            # Deprecations inside torch and transformers, about which the user can do nothing.
            warnings.simplefilter("ignore")
            program = export_step(step, _load_model(work), work.batch_size, work.sequence_length)
            aoti_compile_and_package(
                program,
                package_path=str(work.output / f"{step}.pt2"),
                inductor_configs={
                    "aot_inductor.package_constants_in_so": False,
                    # Compiled headers would take 280 MB of /tmp per model, in a folder whose name
                    # another user can take first.
                    "aot_inductor.precompile_headers": False,
                    # The wrapper only calls kernels; optimising it takes twice the time.
                    "aot_inductor.compile_wrapper_opt_level": "O0",
                    "cpp.vec_isa_ok": compiler_knows_instructions(),
                },
            )
    except Exception as error:
        if full := disk_failure(error, work.output):
            raise full from None
        # As text: some of the compiler's exceptions cannot be pickled between processes.
        raise StageFailure(f"Compiling {step} failed: {type(error).__name__}: {error}") from error
    return peak_resident() or 0
