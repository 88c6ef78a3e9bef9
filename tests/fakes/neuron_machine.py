"""A Neuron machine made of files: device nodes, what the hypervisor tells, and a neuron-ls on the
PATH."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from stages.backends.neuron import hardware
from stages.run import cost
from stages.run.machines import NEURON_MACHINES

# One device as neuron-ls reports it on a trn1.2xlarge.
DEVICE = {
    "neuron_device": 0,
    "bdf": "0000:00:1e.0",
    "cpu_affinity": "0-7",
    "numa_node": "-1",
    "connected_to": None,
    "nc_count": 2,
    "memory_size": 34359738368,
    "neuroncore_ids": [0, 1],
    "neuron_processes": [],
}


class FakeMachine:
    """What a test says of the machine; at first it is no EC2 instance, has no device, and no
    neuron-ls."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.dev, self.dmi, self.bin = (folder / name for name in ("dev", "dmi", "bin"))
        for path in (self.dev, self.dmi, self.bin):
            path.mkdir(parents=True)
        self._patch = monkeypatch
        monkeypatch.setattr(hardware, "DEVICE_NODES", self.dev)
        monkeypatch.setattr(hardware, "NEURON_LS", str(folder / "opt" / "neuron-ls"))
        monkeypatch.setattr(cost, "DMI", self.dmi)
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")
        for name in ("NEURON_RT_NUM_CORES", "NEURON_RT_VISIBLE_CORES"):
            monkeypatch.delenv(name, raising=False)

    def is_a(self, instance_type: str, devices: int | None = None) -> None:
        """An EC2 instance of that type with its device nodes, or `devices` of them."""
        (self.dmi / "sys_vendor").write_text("Amazon EC2\n")
        (self.dmi / "product_name").write_text(f"{instance_type}\n")
        count = devices if devices is not None else NEURON_MACHINES[instance_type].devices
        for path in self.dev.iterdir():
            path.unlink()
        for number in range(count):
            (self.dev / f"neuron{number}").touch()

    def lists(self, devices: int, cores_per_device: int = 2, **more: object) -> None:
        """neuron-ls reports that many devices."""
        listed = [
            {**DEVICE, **more, "neuron_device": number, "nc_count": cores_per_device}
            for number in range(devices)
        ]
        self.program(
            "neuron-ls",
            f"[ \"$*\" = --json-output ] || exit 2\ncat <<'JSON'\n{json.dumps(listed)}\nJSON\n",
        )

    def program(self, name: str, script: str) -> Path:
        """A shell script on the PATH."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def sets(self, name: str, value: str) -> None:
        self._patch.setenv(name, value)
