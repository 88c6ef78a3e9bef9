"""Checks of a machine that PyTorch runs on: PyTorch, its devices, a C++ compiler, training."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from stages.backends.torch.check import cpp_compiler
from stages.run import allocator
from stages.run.backend import choose
from stages.run.check_result import Check, CheckResult, fail, note
from stages.run.errors import InputError
from stages.run.progress import show_size
from stages.run.settings import Settings


def torch_build(settings: Settings) -> Iterator[CheckResult]:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
    yield CheckResult("PyTorch", f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads")


def devices(settings: Settings) -> Iterator[CheckResult]:
    from stages.backends.device import device_of

    try:
        device = device_of(settings)
    except InputError as error:
        yield fail("device", str(error))
        return
    ranks, memory = device.ranks(), device.memory()
    each = f", {show_size(memory)} for each process" if memory else ""
    most = "any number of" if ranks is None else f"{ranks}"
    yield CheckResult(
        "device",
        f"{device.describe()}{each}; {most} processes can train, NPROC_PER_NODE="
        f"{settings.nproc_per_node}",
    )
    if device.name == "cpu" and (advice := allocator.advice()):
        yield note("allocator", advice)


def neuron(settings: Settings) -> Iterator[CheckResult]:
    """The devices, cores and cache of compiled graphs of a Trainium that PyTorch runs on."""
    if choose(settings).on_neuron:
        from stages.backends.neuron import doctor

        for check in (doctor.devices, doctor.cores, doctor.compile_cache):
            yield from check(settings)


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


CHECKS: list[Check] = [torch_build, devices, neuron, compiler, training]
