"""What the host has: memory, and instructions for bfloat16. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
# The flags of x86 and of Arm that say so.
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def host_memory() -> int | None:
    """Bytes of the host, or the limit of this container where it is less; None where the system
    does not say."""
    if not MEMINFO.exists():
        return None
    match = re.search(r"MemTotal:\s*(\d+) kB", MEMINFO.read_text(encoding="utf-8"))
    total = int(match[1]) * 1024 if match else 0
    limit = (
        CONTAINER_LIMIT.read_text(encoding="utf-8").strip() if CONTAINER_LIMIT.exists() else "max"
    )
    return min(total, int(limit)) if limit.isdigit() else total


def peak_resident() -> int | None:
    """Bytes that this process had in memory at its peak; None where the system does not say.

    Not getrusage's: after a spawn, that begins with the memory of the parent.
    """
    if not STATUS.exists():
        return None
    match = re.search(r"^VmHWM:\s*(\d+) kB", STATUS.read_text(encoding="utf-8"), re.M)
    return int(match[1]) * 1024 if match else None


def computes_bfloat16() -> bool | None:
    """Whether the CPU has instructions for bfloat16; None where the system does not say."""
    if not CPUINFO.exists():
        return None
    match = re.search(r"^(?:flags|Features)\s*:(.*)", CPUINFO.read_text(encoding="utf-8"), re.M)
    return any(flag in BFLOAT16_FLAGS for flag in match[1].split()) if match else None
