"""What the stages need of a Neuron machine: devices, a driver that suits the image, the tools, cores, the compile cache."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from stages.backends.neuron import cache, hardware
from stages.run.check_result import Check, CheckResult, fail, folder_result, note
from stages.run.cost import instance_type
from stages.run.errors import InputError
from stages.run.settings import Settings

# The driver (kernel module) of the host, and the versions that the image's runtime library 2.28 (SDK 2.26.1) works with:
# drivers serve older runtimes, but 2.29 (SDK 2.31) asks for runtime 2.33 or newer. Its own is 2.24.7.0.
DRIVER_FILES = (Path("/sys/module/neuron/version"), Path("/proc/driver/neuron/version"))
DRIVERS = ((2, 24), (2, 29))  # from, and below
SUITABLE = "aws-neuronx-dkms=2.24.7.0"
TOOLS = ("torchrun", "neuron_parallel_compile", "neuronx-cc")


def devices(settings: Settings) -> Iterator[CheckResult]:
    """/dev/neuron0 to N without a gap, usable by this user, and all that this EC2 type has."""
    nodes, where = hardware.device_nodes(), hardware.DEVICE_NODES
    if not nodes:
        remedy = "Run on a trn1 or trn2 instance, in a container with --device=/dev/neuron0 and so on, or set BACKEND=torch"
        yield fail("Neuron devices", f"no {where}/neuron*. {remedy}.")
        return
    gaps = sorted(set(range(nodes[-1])) - set(nodes))
    closed = [node for node in nodes if not os.access(where / f"neuron{node}", os.R_OK | os.W_OK)]
    if gaps:
        yield fail(
            "Neuron devices",
            f"{where}/neuron{_list(gaps)} not there. Hand over all from neuron0 on: the runtime counts from 0.",
        )
    if closed:
        yield fail(
            "Neuron devices",
            f"user {os.getuid()} may not read and write {where}/neuron{_list(closed)}. Set their mode to 666.",
        )
    name = instance_type() or ""
    known = hardware.INSTANCES.get(name)
    if known and len(nodes) < known.devices:
        yield note(
            "Neuron devices",
            f"{len(nodes)} of the {known.devices} of a {name}. A container sees those given with --device alone.",
        )
    elif not gaps and not closed:
        memory = f" of {known.device_memory} GiB" if known else ""
        yield CheckResult("Neuron devices", f"{where}/neuron0 to neuron{nodes[-1]}{memory}")


def driver(settings: Settings) -> Iterator[CheckResult]:
    """The host's driver against the runtime library in the image."""
    file = next((file for file in DRIVER_FILES if file.is_file()), None)
    version = file.read_text(encoding="utf-8").strip() if file else ""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        yield note(
            "Neuron driver",
            f"its version is not in {DRIVER_FILES[0]}. Load it on the host (modprobe neuron), or install {SUITABLE}.",
        )
        return
    found, (oldest, newer) = (int(match[1]), int(match[2])), DRIVERS
    if found >= newer:
        yield fail(
            "Neuron driver",
            f"{version} needs runtime 2.33 or newer, and the pinned SDK 2.26.1 has 2.28. Install {SUITABLE} on the host.",
        )
    elif found < oldest:
        yield note(
            "Neuron driver",
            f"{version} is older than the pinned SDK's. If the runtime refuses it, install {SUITABLE} on the host.",
        )
    else:
        yield CheckResult("Neuron driver", version)


def tools(settings: Settings) -> Iterator[CheckResult]:
    """The programs that a training starts, and that they run this Python: another has other versions of the libraries."""
    here = Path(sys.executable).parent
    for name in TOOLS:
        tool = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{here}")
        if tool is None:
            yield fail(
                name,
                f"neither on the PATH nor in {here}. Install docker/requirements.txt, or run in the image.",
            )
        elif _is_of_this_python(Path(tool)):
            yield CheckResult(name, tool)
        else:
            yield note(
                name,
                f"{tool} belongs to another Python than {sys.executable}. Put {here} first in PATH.",
            )


def _is_of_this_python(tool: Path) -> bool:
    with tool.open("rb") as file:
        first = file.readline(1000)
    interpreter = (
        first[2:].split()[0].decode(errors="replace")
        if first.startswith(b"#!") and first[2:].split()
        else ""
    )
    if Path(interpreter).name.startswith("python") and Path(interpreter).is_absolute():
        return Path(interpreter).parent == Path(sys.executable).parent
    return tool.parent == Path(sys.executable).parent  # `#!/usr/bin/env python3`, or no script


def cores(settings: Settings) -> Iterator[CheckResult]:
    found = hardware.find_hardware()
    if found.cores:  # else `devices` and `training` say it
        yield CheckResult(
            "NeuronCores",
            f"{found.cores} for NPROC_PER_NODE={settings.nproc_per_node} ({found.source})",
        )


def training(settings: Settings) -> Iterator[CheckResult]:
    """What train would refuse before it starts; the tokenizer's size is not known before the data stage ran."""
    from stages.backends.neuron.train import check
    from stages.model.base import base_config

    try:
        check(settings, base_config(settings), 0)
    except InputError as error:
        yield from (fail("training", problem) for problem in error.problems)
    else:
        yield CheckResult("training", "the model can be trained with these settings")


def compiling(settings: Settings) -> Iterator[CheckResult]:
    """What compile-inference would refuse after the training was paid for."""
    from stages.backends.neuron.compile_inference import compile_problems
    from stages.model.base import base_config

    try:
        problems = list(compile_problems(settings, base_config(settings)))
    except InputError:
        return  # `training` says it
    yield from (fail("inference", problem) for problem in problems)
    if not problems:
        yield CheckResult("inference", "the model can be compiled with these settings")


def compile_cache(settings: Settings) -> Iterator[CheckResult]:
    url = settings.neuron_compile_cache_url
    folder = cache.folder_of(url)
    if folder is None:
        yield CheckResult("compile cache", f"{url}, in S3: not looked at here")
        return
    yield folder_result("compile cache", folder, "NEURON_COMPILE_CACHE_URL")
    found = cache.entries(url)
    if waiting := cache.blocked(found, url):
        yield note("compile cache", "\n      ".join(waiting))
    elif found:
        yield CheckResult(
            "compile cache", f"{sum(entry.state == 'done' for entry in found)} graphs compiled"
        )


def _list(numbers: list[int]) -> str:
    return "{" + ",".join(map(str, numbers)) + "}" if len(numbers) > 1 else str(numbers[0])


CHECKS: list[Check] = [devices, driver, tools, cores, training, compiling, compile_cache]
