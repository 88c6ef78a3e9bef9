"""The instructions that compiled code uses, and whether this machine has them.

AOTInductor passes -march=native to the C++ compiler and compiles its GPU kernels for one compute
capability. On another machine such code dies of an illegal instruction, in the middle of an answer
and without a message. So the instruction set is recorded when a model is compiled and compared
before it is loaded.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import NamedTuple

import torch

# The flags in /proc/cpuinfo that name instructions which a compiler chooses by itself. The others
# (hypervisor, tsc, ...) differ between kernels and hypervisors and do not affect compiled code.
# Arm's "Features" are all instructions.
_X86_INSTRUCTIONS = re.compile(
    r"(sse|ssse|avx|amx|fma|bmi|f16c|abm|lzcnt|popcnt|movbe|adx|gfni|aes|vaes|pclmul|vpclmul|sha_ni"
    r"|xop|tbm)"
)
_CPUINFO = Path("/proc/cpuinfo")


class InstructionSet(NamedTuple):
    """`name` is the family ("x86_64 AVX512", "sm_90"), `features` are its extensions.

    `features` is empty where the system does not list them.
    """

    name: str
    features: tuple[str, ...]

    def as_json(self) -> dict[str, str]:
        return {"name": self.name, "features": " ".join(self.features)}

    def problems_with(self, compiled_for: dict[str, str]) -> list[str]:
        """Why code compiled for `compiled_for` (as `as_json` returns it) cannot run here.

        Empty if it can.
        """
        if compiled_for["name"] != self.name:
            return [
                f"it was compiled for the instruction set {compiled_for['name']}, "
                f"this machine has {self.name}"
            ]
        missing = [
            feature for feature in compiled_for["features"].split() if feature not in self.features
        ]
        if missing:
            return [
                f"it was compiled for {self.name} with {', '.join(missing)}, "
                f"which this machine's {self.name} lacks"
            ]
        return []


def cpu_instructions() -> InstructionSet:
    """The instruction set of this machine's CPU, as torch and the kernel report it."""
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
