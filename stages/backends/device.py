"""The devices that PyTorch runs on, and all in which they differ: `cpu`, `cuda`, and `neuron`,
which is Trainium 2 and 3 through AWS's native PyTorch.

Everything else asks a Device. docs/trainium2.md has the sources of what is said of `neuron`: nobody
who wrote this had one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stages.backends.instruction_set import InstructionSet, cpu_instructions
from stages.backends.neuron import hardware
from stages.backends.torch.check import device_problem, native_problem
from stages.run import allocator
from stages.run.backend import choose
from stages.run.errors import InputError
from stages.run.host import peak_resident
from stages.run.settings import Settings

# The kernels of a compiled training: precompile fills it, train reads it, all runs share it.
INDUCTOR_CACHE = Path("outputs/.cache/inductor")

# The name by which transformers calls torch/attention.py. It is here, so that an edit of that file
# makes nothing stale that only asks a device.
PACKED = "packed"


class Device:
    """A CPU, and what holds for all devices."""

    name = "cpu"  # torch's, and DEVICE's
    # One backend for tensors on the device and one for tensors and objects on the CPU.
    process_groups = "gloo"
    cached = "*"  # the files of compiled code in its cache
    always_compiles = False
    fused_adamw = True
    attention = PACKED  # transformers' name of the attention in training
    fixed_shapes = False  # whether each shape of a tensor is compiled by itself
    has_inductor = True  # so that compiled inference is AOTInductor's packages
    compile_processes = 1  # Triton's; a CPU's packages have no kernels of it
    random = "cpu"  # where a generator of random numbers can be

    def __init__(self, settings: Settings):
        self.settings = settings

    @property
    def cache(self) -> Path:
        """Where the compiled code of trainings is, for all runs."""
        return INDUCTOR_CACHE.absolute()

    def torch_device(self) -> torch.device:
        """The device of a process that is alone."""
        return torch.device(self.name)

    def eager_device(self) -> torch.device:
        """Where a model runs that is not compiled."""
        return self.torch_device()

    def join_group(self) -> torch.device:
        """Join the process group of torchrun's ranks; returns this rank's device."""
        dist.init_process_group(self.process_groups)
        return self.torch_device()

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, compiled when it is first called."""
        compiled: Callable[..., Any] = torch.compile(function)
        return compiled

    def environment(self) -> dict[str, str]:
        """What the ranks' environment needs."""
        return {
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache),
            # Precompiled headers would lie in /tmp, where any user can put their own.
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
            # Large tensors in pages of 2 MB, where the system allows it: each step
            # makes its tensors again, and small pages cost it a tenth of its time.
            "THP_MEM_ALLOC_ENABLE": "1",
            **allocator.environment(),
        }

    def problem(self) -> str:
        """Why nothing runs on it here; empty if it does."""
        return ""

    def ranks(self) -> int | None:
        """The most processes that can train on it here; None for any number."""
        return None

    def describe(self) -> str:
        """What it is, for a manifest and the doctor."""
        return f"cpu, {os.cpu_count()} cores"

    def memory(self) -> int | None:
        """Bytes of memory of one rank's device; None for the host's."""
        return None

    def peak_memory(self) -> int | None:
        """Bytes that this process had at its peak on its device, on a CPU all of its memory; None
        where that is not known."""
        return peak_resident()

    def release_memory(self) -> None:
        """Give the memory of freed tensors back, for another process."""

    def instructions(self) -> InstructionSet:
        """What code is compiled for."""
        return cpu_instructions()

    def inference_problem(self) -> str:
        """Why nothing can be compiled for inference; empty if it can."""
        return ""


class Cuda(Device):
    """NVIDIA GPUs, one for each rank."""

    name = "cuda"
    attention = "sdpa"
    compile_processes, random = 0, "cuda"  # 0: as many as inductor chooses
    process_groups = "cpu:gloo,cuda:nccl"

    def join_group(self) -> torch.device:
        device = torch.device(self.name, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # before NCCL looks for one
        dist.init_process_group(self.process_groups, device_id=device)
        return device

    def problem(self) -> str:
        if torch.cuda.is_available():
            return ""
        return "DEVICE=cuda: PyTorch sees no NVIDIA GPU here. Set cpu, or auto."

    def ranks(self) -> int | None:
        return torch.cuda.device_count()

    def describe(self) -> str:
        return torch.cuda.get_device_name()

    def memory(self) -> int | None:
        return min(
            torch.cuda.get_device_properties(index).total_memory
            for index in range(torch.cuda.device_count())
        )

    def peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated()

    def release_memory(self) -> None:
        torch.cuda.empty_cache()

    def instructions(self) -> InstructionSet:
        major, minor = torch.cuda.get_device_capability()
        return InstructionSet(f"sm_{major}{minor}", ())

    def inference_problem(self) -> str:
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is not None:
            return ""
        # torch's wheels bring CUDA's libraries but not all of its headers, which the packages' C++
        # includes.
        return (
            "The CUDA toolkit is not installed, and compiling for the GPU needs its headers. "
            "Install it or set CUDA_HOME, or compile for the CPU with DEVICE=cpu."
        )


class Neuron(Device):
    """Trainium 2 and 3, a logical core for each rank.

    The group comes before the first use of the device, whose name never has an index.
    """

    name = "neuron"
    process_groups = "cpu:gloo,neuron:neuron"
    cached = "*.neff"
    always_compiles = True  # each operation that is not compiled costs some 60 us
    fused_adamw = False  # not documented; foreach is torch's own
    attention, fixed_shapes = "sdpa", True
    has_inductor = False

    @property
    def cache(self) -> Path:
        return Path(self.settings.neuron_compile_cache_url, "neff")

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # One graph for one shape. Without dynamic=False a second shape would make torch ask for a
        # graph of any shape, which this compiler refuses.
        compiled: Callable[..., Any] = torch.compile(
            function, backend="neuron", fullgraph=True, dynamic=False
        )
        return compiled

    def eager_device(self) -> torch.device:
        return torch.device("cpu")  # each length of an answer would be compiled

    def environment(self) -> dict[str, str]:
        return {"TORCH_NEURONX_NEFF_CACHE_DIR": str(self.cache)}

    def problem(self) -> str:
        return device_problem(replace(self.settings, device=self.name)) or native_problem()

    def ranks(self) -> int | None:
        return hardware.find_hardware().cores

    def describe(self) -> str:
        return hardware.device_name()

    def memory(self) -> int | None:
        return hardware.core_memory()

    def peak_memory(self) -> int | None:
        return None  # AWS does not document how to ask

    def instructions(self) -> InstructionSet:
        return InstructionSet(hardware.find_hardware().target, ())


DEVICES: dict[str, type[Device]] = {one.name: one for one in (Device, Cuda, Neuron)}


def device_of(settings: Settings) -> Device:
    """The device that DEVICE names, or the fastest that is here.

    Raises InputError where it cannot be used.
    """
    name = "neuron" if choose(settings).on_neuron else settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = DEVICES[name](settings)
    if problem := device.problem():
        raise InputError(problem)
    return device
