"""Which Neuron machine this is: the cores that a process here may use, and where that was read.

A core is what one training process runs on: a NeuronCore of Trainium or Inferentia2, a logical core (two physical
ones) of Trainium2. Standard library only.
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

DEVICE_NODES = Path("/dev")
# AWS's tools are put on the PATH by its machine images' login shells only.
NEURON_LS = "/opt/aws/neuron/bin/neuron-ls"


@dataclass(frozen=True)
class Instance:
    """What an EC2 type has: devices, cores of all devices together, memory of one device in GiB."""

    devices: int
    cores: int
    device_memory: int


# https://awsdocs-neuron.readthedocs-hosted.com/en/latest/about-neuron/arch/neuron-hardware/ (trn1-, trn2- and inf2-arch);
# Trainium2 with its cores in pairs, as the runtime has them and as optimum-neuron alone supports.
INSTANCES = {
    "trn1.2xlarge": Instance(devices=1, cores=2, device_memory=32),
    "trn1.32xlarge": Instance(devices=16, cores=32, device_memory=32),
    "trn1n.32xlarge": Instance(devices=16, cores=32, device_memory=32),
    "trn2.3xlarge": Instance(devices=1, cores=4, device_memory=96),
    "trn2.48xlarge": Instance(devices=16, cores=64, device_memory=96),
    "inf2.xlarge": Instance(devices=1, cores=2, device_memory=32),
    "inf2.8xlarge": Instance(devices=1, cores=2, device_memory=32),
    "inf2.24xlarge": Instance(devices=6, cores=12, device_memory=32),
    "inf2.48xlarge": Instance(devices=12, cores=24, device_memory=32),
}


@dataclass(frozen=True)
class Hardware:
    """`cores` that a process may use, `source` in words, `target`: trn1 (also for Inferentia2) or trn2, as the compiler names it."""

    cores: int
    source: str
    target: str


def find_hardware() -> Hardware:
    """The cores as neuron-ls tells, else by counting device nodes; NEURON_RT_* that narrow them are respected."""
    listed = neuron_ls()
    nodes = device_nodes()
    name = instance_type() or next(
        (str(device["instance_type"]) for device in listed if device.get("instance_type")), ""
    )
    if listed:
        cores = sum(device["nc_count"] for device in listed)
        per_device = max(device["nc_count"] for device in listed)
        source = f"neuron-ls: {_count(len(listed), 'device')}, {_count(cores, 'core')}"
    else:
        per_device = 4 if name.startswith("trn2") else 2
        cores = len(nodes) * per_device
        source = f"{DEVICE_NODES}/neuron*: {_count(len(nodes), 'device')} x {per_device} cores{f' of a {name}' if name else ''}"
    target = "trn2" if name.startswith("trn2") or per_device > 2 else "trn1"
    if not cores:
        return Hardware(0, f"neither neuron-ls nor {DEVICE_NODES}/neuron* shows a device", target)
    allowed, why = _narrowed(cores)
    return Hardware(allowed, f"{source}{why}", target)


def neuron_cores() -> tuple[int, str]:
    """How many cores there are for the processes of a training, and where that was read."""
    machine = find_hardware()
    return machine.cores, machine.source


def device_name() -> str:
    """What did the work, for the manifest: `trn1.32xlarge, 32 NeuronCores`."""
    machine = find_hardware()
    return f"{instance_type() or machine.target}, {_count(machine.cores, 'NeuronCore')}"


def device_nodes() -> list[int]:
    """The numbers N of /dev/neuronN, in order."""
    found = (re.fullmatch(r"neuron(\d+)", path.name) for path in DEVICE_NODES.glob("neuron*"))
    return sorted(int(match[1]) for match in found if match)


def neuron_ls() -> list[dict[str, Any]]:
    """The devices as `neuron-ls --json-output` lists them ("neuron_device", "nc_count", "memory_size" in bytes, ...).

    Empty where the tool is missing or finds none. On Trainium2 "nc_count" counts logical cores.
    """
    tool = shutil.which("neuron-ls") or shutil.which(NEURON_LS)
    if tool is None:
        return []
    try:
        answer = subprocess.run([tool, "--json-output"], capture_output=True, text=True, timeout=20)
        devices = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return []
    whole = isinstance(devices, list) and all(
        isinstance(device, dict) and isinstance(device.get("nc_count"), int) for device in devices
    )
    return devices if whole and not answer.returncode else []


def _narrowed(cores: int) -> tuple[int, str]:
    """The cores that NEURON_RT_NUM_CORES and NEURON_RT_VISIBLE_CORES leave of `cores`, and those settings in words."""
    left, why = cores, ""
    visible, number = (
        os.environ.get("NEURON_RT_VISIBLE_CORES", "").strip(),
        os.environ.get("NEURON_RT_NUM_CORES", "").strip(),
    )
    if visible:
        left = len({core for core in _core_ids(visible) if core < cores})
        why += f", NEURON_RT_VISIBLE_CORES={visible}"
    if number:
        if not number.isascii() or not number.isdigit():
            raise InputError(
                f"NEURON_RT_NUM_CORES={number[:60]!r} is no number of cores. Unset it, or set one up to {cores}."
            )
        left = min(left, int(number))
        why += f", NEURON_RT_NUM_CORES={number}"
    return left, why


def _core_ids(text: str) -> set[int]:
    """The cores that `4`, `0-7` or `0,2,4-5` names (the runtime's notation)."""
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text, re.ASCII):
        raise InputError(
            f"NEURON_RT_VISIBLE_CORES={text[:60]!r} names no cores. Unset it, or write 4, 0-7 or 0,2,4-5."
        )
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
