"""Checks of a Neuron machine: devices, driver, tools, cores, training, inference, compile cache."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from stages.backends.neuron import cache, hardware
from stages.backends.neuron.arguments import own_path
from stages.run.check_result import Check, CheckResult, fail, folder_result, note
from stages.run.cost import instance_type
from stages.run.machines import NEURON_MACHINES
from stages.run.settings import Settings

# The host's driver (a kernel module), and the versions that work with the image's runtime library
# 2.28 (SDK 2.26.1): a driver serves older runtimes, but driver 2.29 (SDK 2.31) needs runtime 2.33
# or newer. The SDK's own driver is 2.24.7.0.
DRIVER_FILES = (Path("/sys/module/neuron/version"), Path("/proc/driver/neuron/version"))
DRIVERS = ((2, 24), (2, 29))  # from the first, below the second
SUITABLE = "aws-neuronx-dkms=2.24.7.0"
TOOLS = ("torchrun", "neuron_parallel_compile", "neuronx-cc")


def devices(settings: Settings) -> Iterator[CheckResult]:
    """/dev/neuron0 to N without a gap, usable by this user, and all that this EC2 type has."""
    nodes, folder = hardware.device_nodes(), hardware.DEVICE_NODES
    if not nodes:
        yield fail(
            "Neuron devices",
            f"{folder} has no neuron*. Run on a trn1 or trn2 instance, in a container with "
            "--device=/dev/neuron0 and so on, or set BACKEND=torch.",
        )
        return
    gaps = sorted(set(range(nodes[-1])) - set(nodes))
    closed = [node for node in nodes if not os.access(folder / f"neuron{node}", os.R_OK | os.W_OK)]
    if gaps:
        yield fail(
            "Neuron devices",
            f"{folder}/neuron{_list(gaps)} missing. Pass all devices from neuron0 on to the "
            "container: the runtime counts from 0.",
        )
    if closed:
        yield fail(
            "Neuron devices",
            f"user {os.getuid()} may not read and write {folder}/neuron{_list(closed)}. Set their "
            "mode to 666.",
        )
    name = instance_type() or ""
    instance = NEURON_MACHINES.get(name)
    if instance and len(nodes) < instance.devices:
        yield note(
            "Neuron devices",
            f"{len(nodes)} of the {instance.devices} of a {name}. A container sees only those "
            "passed with --device.",
        )
    elif not gaps and not closed:
        memory = f" of {instance.device_memory} GiB" if instance else ""
        yield CheckResult("Neuron devices", f"{folder}/neuron0 to neuron{nodes[-1]}{memory}")


def driver(settings: Settings) -> Iterator[CheckResult]:
    """The host's driver, against the runtime library in the image."""
    file = next((file for file in DRIVER_FILES if file.is_file()), None)
    version = file.read_text(encoding="utf-8").strip() if file else ""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        yield note(
            "Neuron driver",
            f"{DRIVER_FILES[0]} has no version. Load the driver on the host (modprobe neuron), or "
            f"install {SUITABLE}.",
        )
        return
    installed, (oldest, too_new) = (int(match[1]), int(match[2])), DRIVERS
    if installed >= too_new:
        remedy = f"Install {SUITABLE} on the host."
        if hardware.find_hardware().target == "trn2":  # AWS's newer SDKs for trn2 need that driver
            remedy = "Keep the driver; train on a trn1 instance, which this SDK is for."
        yield fail(
            "Neuron driver",
            f"{version} needs runtime 2.33 or newer, and the pinned SDK 2.26.1 has 2.28. {remedy}",
        )
    elif installed < oldest:
        yield note(
            "Neuron driver",
            f"{version} is older than the pinned SDK's. If the runtime refuses it, install "
            f"{SUITABLE} on the host.",
        )
    else:
        yield CheckResult("Neuron driver", version)


def tools(settings: Settings) -> Iterator[CheckResult]:
    """The programs that a training starts, and whether they run this Python.

    Another Python has other versions of the libraries: a graph would be compiled by one compiler
    under the name of another. Another's torchrun is harmless, because it starts this Python.
    """
    scripts = Path(sys.executable).parent
    for name in TOOLS:
        tool = shutil.which(name, path=own_path())
        if tool is None:
            yield fail(
                name,
                f"neither on the PATH nor in {scripts}. Install docker/requirements.txt, or run in "
                "the image.",
            )
        elif _is_of_this_python(Path(tool)):
            yield CheckResult(name, tool)
        else:
            finding = note if name == "torchrun" else fail
            yield finding(
                name,
                f"{tool} belongs to another Python than {sys.executable}; {name} is not in "
                f"{scripts}. Install docker/requirements.txt there (`make` does), or run in the "
                "image.",
            )


def _is_of_this_python(tool: Path) -> bool:
    with tool.open("rb") as file:
        first_line = file.readline(1000)
    words = first_line[2:].split() if first_line.startswith(b"#!") else []
    interpreter = Path(words[0].decode(errors="replace")) if words else Path()
    if interpreter.name.startswith("python") and interpreter.is_absolute():
        return interpreter.parent == Path(sys.executable).parent
    return tool.parent == Path(sys.executable).parent  # `#!/usr/bin/env python3`, or not a script


def cores(settings: Settings) -> Iterator[CheckResult]:
    machine = hardware.find_hardware()
    if machine.cores:  # without cores `devices` fails
        yield CheckResult(
            "NeuronCores",
            f"{machine.cores} for NPROC_PER_NODE={settings.nproc_per_node} ({machine.source})",
        )


def compile_cache(settings: Settings) -> Iterator[CheckResult]:
    url = settings.neuron_compile_cache_url
    folder = cache.folder_of(url)
    if folder is None:
        yield CheckResult("compile cache", f"{url}, in S3: not read here")
        return
    yield folder_result("compile cache", folder, "NEURON_COMPILE_CACHE_URL")
    graphs = cache.entries(url)
    if blocked := cache.blocked(graphs, url):
        yield note("compile cache", "\n      ".join(blocked))
    elif graphs:
        compiled = sum(entry.state == "done" for entry in graphs)
        yield CheckResult("compile cache", f"{compiled} graphs compiled")


def _list(numbers: list[int]) -> str:
    return "{" + ",".join(map(str, numbers)) + "}" if len(numbers) > 1 else str(numbers[0])


CHECKS: list[Check] = [devices, driver, tools, cores, compile_cache]
