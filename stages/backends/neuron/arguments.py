"""The command and the environment of a training on Neuron, for precompile and for train.

The compiler must get the same in both, or train compiles for 40 minutes what precompile should have
compiled. Settings become fields of optimum-neuron's NeuronTrainingArguments, which the worker
parses from its command line. No flag may be an option of neuron_parallel_compile or a prefix of
one: neuron_parallel_compile removes those from the command that it runs.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from stages.run.layout import CHECKPOINTS_FOLDER
from stages.run.settings import Settings

# NKI's flash-attention kernel takes sequences of whole blocks of this length in tokens
# (optimum-neuron, models/training/llama).
FLASH_ATTENTION_BLOCK = 2048

# Upstream's launcher sets these (optimum-neuron, docs/source/training_tutorials/*.sh, and the AWS
# samples that they follow).
COMPILER_FLAGS = "--model-type transformer --retry_failed_compilation"
RUNTIME = {
    "NEURON_FUSE_SOFTMAX": "1",
    "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS": "3",
    "MALLOC_ARENA_MAX": "64",  # glibc's arenas of 32 processes' threads would fill the host memory
}


def training_command(
    settings: Settings, base: Path, data: Path, work: Path, *, steps: int, first_step: int = 0
) -> list[str]:
    """torchrun and the worker, as train and precompile run them.

    They run the optimizer steps from `first_step` up to, and without, `steps`.
    """
    launcher = [
        "torchrun",
        "--nproc_per_node",
        str(settings.nproc_per_node),
        "-m",
        "stages.backends.neuron.worker",
    ]
    worker: dict[str, object] = {
        "base": base,
        "data": data,
        "work": work,
        "first_step": first_step,
        **lora_arguments(settings),
    }
    worker |= training_arguments(settings, work / CHECKPOINTS_FOLDER, steps - first_step)
    return [
        *launcher,
        *(part for name, value in worker.items() for part in (f"--{name}", str(value))),
    ]


def lora_arguments(settings: Settings) -> dict[str, str]:
    """The worker's arguments for LoRA, by name; empty where all weights are trained."""
    if not settings.lora_r:
        return {}
    names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
    return {name: str(getattr(settings, name)) for name in names}


def training_arguments(settings: Settings, output_dir: Path, max_steps: int) -> dict[str, str]:
    """Field of NeuronTrainingArguments -> its value as text, for `max_steps` optimizer steps."""
    s = settings
    # Hugging Face's "constant" has no warm-up.
    scheduler = "constant_with_warmup" if s.lr_scheduler_type == "constant" else s.lr_scheduler_type
    values = {
        "output_dir": output_dir,
        "max_steps": max_steps,
        "num_train_epochs": 1,  # the worker's dataset has the sequences of all steps, in order
        "per_device_train_batch_size": s.per_device_train_batch_size,
        # Not used, but a pipeline checks that it can be divided like the other.
        "per_device_eval_batch_size": s.per_device_train_batch_size,
        "gradient_accumulation_steps": s.gradient_accumulation_steps,
        "learning_rate": s.learning_rate,
        "lr_scheduler_type": scheduler,
        "warmup_steps": s.warmup_steps,
        "weight_decay": s.weight_decay,
        "adam_beta1": s.adam_beta1,
        "adam_beta2": s.adam_beta2,
        "adam_epsilon": s.adam_epsilon,
        "max_grad_norm": s.max_grad_norm,
        "seed": s.seed,
        "bf16": s.bf16,
        "tensor_parallel_size": s.tensor_parallel_size,
        "pipeline_parallel_size": s.pipeline_parallel_size,
        "disable_sequence_parallel": False,  # it is on wherever there is tensor parallelism
        "zero_1": s.zero_1,
        "gradient_checkpointing": s.gradient_checkpointing,
        "logging_steps": s.logging_steps,
        "save_strategy": "steps" if s.save_steps else "no",
        "save_steps": s.save_steps or 1,
        "save_total_limit": s.save_total_limit,
        # The optimizer's state cannot be loaded again: the trainer refuses to resume.
        "save_only_model": True,
        # Otherwise an uncaught error from the Hub ends a finished training. `make
        # cache-synchronize` uploads.
        "skip_cache_push": True,
        "report_to": "none",
        "disable_tqdm": True,  # the worker shows the progress
    }
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in values.items()
    }


def attention_implementation(max_length: int) -> str:
    """The attention of the training model: flash where the length allows it."""
    return "eager" if max_length % FLASH_ATTENTION_BLOCK else "flash_attention_2"


def environment(settings: Settings) -> dict[str, str]:
    """The variables of the workers, the compiler and the runtime, besides the caller's."""
    return {
        # The Hub is asked for compiled graphs only if CUSTOM_CACHE_REPO names a repository. No
        # other has this worker's graphs, and each rank would ask for each of them.
        **(cache_repository(settings) or {"HF_HUB_OFFLINE": "1"}),
        **{name: os.environ.get(name, value) for name, value in RUNTIME.items()},
        **cache_environment(settings),
        # Two Neuron SDKs must not mix: neuronx-cc's version is part of the name of every graph.
        "PYTHON_EXEC": sys.executable,
        "PATH": own_path(),
        # With torchrun's default port only one training can run on a host.
        "PET_MASTER_PORT": os.environ.get("PET_MASTER_PORT", str(free_port())),
        # At ERROR torchrun repeats the error of a worker.
        "LOGLEVEL": os.environ.get("LOGLEVEL", "CRITICAL"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def own_path() -> str:
    """The PATH of what is launched: this Python's programs, then the caller's."""
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"


def free_port() -> int:
    """A TCP port on which no process listens now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def cache_repository(settings: Settings) -> dict[str, str]:
    """The variable that names the Hub's repository of compiled graphs; empty where none is set."""
    repository = settings.custom_cache_repo
    return {"CUSTOM_CACHE_REPO": repository} if repository else {}


def cache_environment(settings: Settings) -> dict[str, str]:
    """The variables that name the compile cache.

    libneuronxla reads the URL, optimum-neuron the flag. A bucket has no flag, because
    optimum-neuron would take `s3` for a folder.
    """
    flags = [
        flag
        for flag in os.environ.get("NEURON_CC_FLAGS", COMPILER_FLAGS).split()
        if not flag.startswith("--cache_dir")
    ]
    url = settings.neuron_compile_cache_url
    if not url.startswith("s3://"):
        flags.append(f"--cache_dir={url}")
    return {"NEURON_COMPILE_CACHE_URL": url, "NEURON_CC_FLAGS": " ".join(flags)}
