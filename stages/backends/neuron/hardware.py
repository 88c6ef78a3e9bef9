"""The Neuron machine: the cores that a process here may use, and how they were counted.

A core is what one training process runs on: a NeuronCore of Trainium or Inferentia2, a logical core
(two physical ones) of Trainium2. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.run.cost import instance_type
from stages.run.errors import InputError
from stages.run.machines import NEURON_MACHINES

DEVICE_NODES = Path("/dev")
# On AWS's machine images only login shells have the tools' folder on the PATH.
NEURON_LS = "/opt/aws/neuron/bin/neuron-ls"


@dataclass(frozen=True)
class Hardware:
    """`cores` that a process may use, and `source`: how they were counted, as text.

    `target` is the compiler's name: trn1 (also for Inferentia2) or trn2.
    """

    cores: int
    source: str
    target: str


def find_hardware() -> Hardware:
    """The cores that neuron-ls lists, else those of the device nodes, limited by NEURON_RT_*."""
    devices = neuron_ls()
    nodes = device_nodes()
    name = instance_type() or next(
        (str(device["instance_type"]) for device in devices if device.get("instance_type")), ""
    )
    if devices:
        cores = sum(device["nc_count"] for device in devices)
        per_device = max(device["nc_count"] for device in devices)
        source = f"neuron-ls: {_count(len(devices), 'device')}, {_count(cores, 'core')}"
    else:
        per_device = 4 if name.startswith("trn2") else 2
        cores = len(nodes) * per_device
        instance = f" of a {name}" if name else ""
        source = (
            f"{DEVICE_NODES}/neuron*: {_count(len(nodes), 'device')} x {per_device} cores{instance}"
        )
    target = "trn2" if name.startswith("trn2") or per_device > 2 else "trn1"
    if not cores:
        return Hardware(0, f"neither neuron-ls nor {DEVICE_NODES}/neuron* shows a device", target)
    usable, limits = _limited(cores)
    return Hardware(usable, f"{source}{limits}", target)


def neuron_cores() -> tuple[int, str]:
    """The number of cores for the processes of a training, and how they were counted."""
    machine = find_hardware()
    return machine.cores, machine.source


def core_memory() -> int | None:
    """Bytes of device memory of one core; None where this is no instance whose memory is known."""
    instance = NEURON_MACHINES.get(instance_type() or "")
    return instance.core_memory if instance else None


def device_name() -> str:
    """The machine's name for the manifest: `trn1.32xlarge, 32 NeuronCores`."""
    machine = find_hardware()
    return f"{instance_type() or machine.target}, {_count(machine.cores, 'NeuronCore')}"


def device_nodes() -> list[int]:
    """The numbers N of /dev/neuronN, in order."""
    matches = (re.fullmatch(r"neuron(\d+)", path.name) for path in DEVICE_NODES.glob("neuron*"))
    return sorted(int(match[1]) for match in matches if match)


def neuron_ls() -> list[dict[str, Any]]:
    """The devices that `neuron-ls --json-output` lists.

    Each has "neuron_device", "nc_count", "memory_size" in bytes, and more; on Trainium2 "nc_count"
    counts logical cores. Empty if the tool is missing or lists no device.
    """
    tool = shutil.which("neuron-ls") or shutil.which(NEURON_LS)
    if tool is None:
        return []
    try:
        ended = subprocess.run([tool, "--json-output"], capture_output=True, text=True, timeout=20)
        devices = json.loads(ended.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return []
    valid = isinstance(devices, list) and all(
        isinstance(device, dict) and isinstance(device.get("nc_count"), int) for device in devices
    )
    return devices if valid and not ended.returncode else []


def _limited(cores: int) -> tuple[int, str]:
    """How many of `cores` NEURON_RT_NUM_CORES and NEURON_RT_VISIBLE_CORES allow.

    The second value names the settings that limit them.
    """
    usable, limits = cores, ""
    visible = os.environ.get("NEURON_RT_VISIBLE_CORES", "").strip()
    number = os.environ.get("NEURON_RT_NUM_CORES", "").strip()
    if visible:
        usable = len({core for core in _core_ids(visible) if core < cores})
        limits += f", NEURON_RT_VISIBLE_CORES={visible}"
    if number:
        if not number.isascii() or not number.isdigit():
            raise InputError(
                f"NEURON_RT_NUM_CORES={number[:60]!r} is not a number of cores. Unset it, or set "
                f"one up to {cores}."
            )
        usable = min(usable, int(number))
        limits += f", NEURON_RT_NUM_CORES={number}"
    return usable, limits


def _core_ids(text: str) -> set[int]:
    """The cores that `4`, `0-7` or `0,2,4-5` names (the runtime's notation)."""
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text, re.ASCII):
        raise InputError(
            f"NEURON_RT_VISIBLE_CORES={text[:60]!r} names no cores. Unset it, or write 4, 0-7 or "
            "0,2,4-5."
        )
    ids: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        ids |= set(range(int(first), int(last or first) + 1))
    return ids


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
