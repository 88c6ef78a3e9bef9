"""Checks of a machine without Neuron devices: PyTorch, its devices, a C++ compiler, training."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

from stages.backends.torch.check import cpp_compiler
from stages.run.check_result import Check, CheckResult, fail
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
    tool = shutil.which(cpp_compiler())
    if tool is None:
        return  # a problem of compile-inference, which doctor prints with the others
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
    """What keeps this machine from training with these settings."""
    from stages.backends.torch.train import device_problems

    yield from (fail("training", problem) for problem in device_problems(settings))


CHECKS: list[Check] = [torch_build, devices, compiler, training]
