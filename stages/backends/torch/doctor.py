"""Checks of a machine without Neuron devices: PyTorch, its devices, a C++ compiler, training."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

from stages.run.check_result import Check, CheckResult, fail
from stages.run.errors import InputError
from stages.run.progress import show_size
from stages.run.settings import Settings


def torch_build(settings: Settings) -> Iterator[CheckResult]:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
    yield CheckResult("PyTorch", f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads")


def devices(settings: Settings) -> Iterator[CheckResult]:
    import torch

    if not torch.cuda.is_available():
        yield CheckResult(
            "devices",
            f"no CUDA device; {os.cpu_count()} CPU cores for "
            f"NPROC_PER_NODE={settings.nproc_per_node}",
        )
        return
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    yield CheckResult(
        "devices", ", ".join(f"{gpu.name} with {show_size(gpu.total_memory)}" for gpu in gpus)
    )


def compiler(settings: Settings) -> Iterator[CheckResult]:
    """The C++ compiler: compile-inference needs it, and so does training with TORCH_COMPILE."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    tool = shutil.which(name)
    if tool is None:
        yield fail(
            "C++ compiler",
            f"{name} is not on the PATH. Install it (Debian, Ubuntu: apt install g++) or name "
            "another in CXX.",
        )
        return
    version = subprocess.run([tool, "--version"], capture_output=True, text=True)
    if version.returncode:
        yield fail(
            "C++ compiler",
            f"{tool} --version ends with status {version.returncode}. Install it again or name "
            "another in CXX.",
        )
    else:
        yield CheckResult("C++ compiler", version.stdout.partition("\n")[0])


def training(settings: Settings) -> Iterator[CheckResult]:
    """What train refuses before it starts, except for the tokenizer's size.

    That is known only after the data stage has run.
    """
    from stages.backends.torch.train import check
    from stages.model.base import base_config

    try:
        check(settings, base_config(settings), vocabulary=0)
    except InputError as error:
        yield from (fail("training", problem) for problem in error.problems)
    else:
        yield CheckResult("training", "the model can be trained with these settings")


CHECKS: list[Check] = [torch_build, devices, compiler, training]
