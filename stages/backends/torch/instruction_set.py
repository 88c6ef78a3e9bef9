"""Which instructions compiled code may use: what an artifact was compiled for, and whether this machine has it.

AOTInductor passes -march=native to the C++ compiler and compiles its GPU kernels for one compute capability. On another
machine such code dies of an illegal instruction, in the middle of an answer and without a message. So the instruction
set is recorded when a model is compiled and compared before one is loaded.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import NamedTuple

import torch

# Of /proc/cpuinfo's flags, those that name instructions a compiler chooses by itself. The rest (hypervisor, tsc, ...)
# differ between kernels and hypervisors and mean nothing to compiled code. Arm's "Features" are instructions, all of them.
_X86_INSTRUCTIONS = re.compile(
    r"(sse|ssse|avx|amx|fma|bmi|f16c|abm|lzcnt|popcnt|movbe|adx|gfni|aes|vaes|pclmul|vpclmul|sha_ni|xop|tbm)"
)
_CPUINFO = Path("/proc/cpuinfo")


class InstructionSet(NamedTuple):
    """`name` is the family ("x86_64 AVX512", "sm_90"); `features` its extensions, empty where the system does not tell."""

    name: str
    features: tuple[str, ...]

    def as_json(self) -> dict[str, str]:
        return {"name": self.name, "features": " ".join(self.features)}

    def problems_with(self, compiled_for: dict[str, str]) -> list[str]:
        """Why code that was compiled for `compiled_for` (the form of `as_json`) cannot run here; empty when it can."""
        if compiled_for["name"] != self.name:
            return [
                f"it was compiled for the instruction set {compiled_for['name']}, this machine has {self.name}"
            ]
        missing = [
            feature for feature in compiled_for["features"].split() if feature not in self.features
        ]
        if missing:
            return [
                f"it was compiled for {self.name} with {', '.join(missing)}, which this machine's {self.name} lacks"
            ]
        return []


def instruction_set(device: str) -> InstructionSet:
    """The instruction set of this machine's `device` ("cpu" or "cuda"), as torch and the kernel report it."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return InstructionSet(f"sm_{major}{minor}", ())
    return InstructionSet(
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}", _cpu_features()
    )


def _cpu_features() -> tuple[str, ...]:
    if not _CPUINFO.exists():  # macOS, where inductor compiles for the architecture's baseline
        return ()
    with _CPUINFO.open(encoding="utf-8") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == "flags":
                return tuple(
                    sorted(flag for flag in value.split() if _X86_INSTRUCTIONS.match(flag))
                )
            if key.strip() == "Features":
                return tuple(sorted(value.split()))
    return ()
