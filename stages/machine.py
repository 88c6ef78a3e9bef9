"""What this machine has for the stages: Python, make, packages, disk and memory.

The doctor's checks of every backend's machine; those of its devices are in the backend's own
module `doctor`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from stages.forecast.fits import in_all, need_of, remedy
from stages.forecast.machine import place_of
from stages.forecast.planned import shape_here
from stages.model.size import bytes_written, parameters
from stages.run.backend import choose
from stages.run.check_result import CheckResult, fail, folder_result, note
from stages.run.cost import dollars, hourly_price, instance_type
from stages.run.disk import REMEDY, free_space, write_speed
from stages.run.errors import InputError
from stages.run.host import host_memory
from stages.run.progress import duration, show_size
from stages.run.provenance import REQUIREMENTS, installed_version, pinned_versions
from stages.run.settings import Settings

PYTHONS = {"torch": ((3, 10), (3, 12)), "neuron": ((3, 10), (3, 11)), "native": ((3, 12), (3, 12))}
OLDEST_MAKE = (4, 2)  # the first that reads a file with $(file <NAME)
OUTPUTS = Path("outputs")
ROOM_TO_MEASURE = 10**9  # bytes free, below which no speed is measured
SLOW_DISK = 200e6  # bytes per second; a gp3 volume has 125 MB/s unless more is asked for


def python_version(settings: Settings) -> Iterator[CheckResult]:
    chosen = choose(settings)
    oldest, newest = PYTHONS["native" if chosen.on_neuron else chosen.name]
    version = f"{sys.version.split()[0]}, {sys.executable}"
    if oldest <= sys.version_info[:2] <= newest:
        yield CheckResult("Python", version)
    else:
        yield fail(
            "Python",
            f"{version}. Use {_dotted(oldest)} to {_dotted(newest)}: remove .venv and set PYTHON.",
        )


def make_version(settings: Settings) -> Iterator[CheckResult]:
    tool = shutil.which("make")
    output = (
        subprocess.run([tool, "--version"], capture_output=True, text=True).stdout if tool else ""
    )
    match = re.match(r"GNU Make (\d+)\.(\d+)", output)
    if match and (int(match[1]), int(match[2])) >= OLDEST_MAKE:
        yield CheckResult("make", match[0])
    else:
        problem = match[0] if match else f"{tool} is not GNU make" if tool else "not on the PATH"
        yield fail(
            "make",
            f"{problem}. Install GNU make {_dotted(OLDEST_MAKE)} or newer (Debian, Ubuntu: apt "
            "install make).",
        )


def backend_choice(settings: Settings) -> Iterator[CheckResult]:
    chosen, price = choose(settings), hourly_price(settings)
    cost = f", {price:g} USD/h" if price else ""
    yield CheckResult(
        "backend",
        f"{chosen.name} ({chosen.reason}); {instance_type() or 'not an EC2 instance'}{cost}",
    )


def packages(settings: Settings) -> Iterator[CheckResult]:
    """Compare installed versions with the pins of the backend's requirements. The suffix of a build
    after `+` is ignored."""
    file = REQUIREMENTS[choose(settings).name]
    pins, mismatches = pinned_versions(choose(settings).name), 0
    for name, pinned in pins.items():
        installed = installed_version(name) or ""
        if pinned != (installed if "+" in pinned else installed.partition("+")[0]):
            mismatches += 1
            yield fail(
                name,
                f"{installed or 'not installed'}, pinned is {pinned}. Install {file} (make does, "
                "into .venv).",
            )
    if not mismatches:
        yield CheckResult("packages", f"{len(pins)} as pinned for {file}")


def writable(settings: Settings) -> Iterator[CheckResult]:
    yield folder_result("outputs", OUTPUTS)
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    yield folder_result(
        "Hub's cache", Path(os.environ.get("HF_HOME", caches / "huggingface")), "HF_HOME"
    )


def disk(settings: Settings) -> Iterator[CheckResult]:
    """Compare the free space with what the stages write for this model, as if nothing were written
    yet."""
    free, count = free_space(OUTPUTS), _parameters(settings)
    if count is None:
        yield CheckResult("disk", f"{show_size(free)} free; the size of the model is not known")
        return
    sizes = bytes_written(settings, count, choose(settings).name)
    needed = sum(sizes.values())
    sums = " + ".join(f"{stage} {show_size(size)}" for stage, size in sizes.items() if size)
    text = f"{show_size(free)} free of {show_size(needed)} that {count:,} parameters take ({sums})"
    if free >= needed:
        yield CheckResult("disk", text)
    else:
        yield fail("disk", f"{text}. {REMEDY}")


def disk_speed(settings: Settings) -> Iterator[CheckResult]:
    """Measure how fast outputs' disk is written, and say what that means for this model."""
    free = free_space(OUTPUTS)
    if free < ROOM_TO_MEASURE:
        yield CheckResult("disk speed", f"not measured: {show_size(free)} free")
        return
    try:
        speed = write_speed(OUTPUTS)
    except OSError as error:
        yield note("disk speed", f"not measured: {error}")
        return
    text = f"about {show_size(speed)}/s are written"
    chosen, count, price = choose(settings).name, _parameters(settings), hourly_price(settings)
    if count is not None:
        size = sum(bytes_written(settings, count, chosen).values())
        seconds = size / speed
        cost = f", {dollars(seconds, price):.2f} USD," if price else ""
        text += f": at least {duration(seconds)}{cost} for {show_size(size)}"
    if chosen == "neuron" and speed < SLOW_DISK:
        yield note(
            "disk speed",
            f"{text}. All devices wait meanwhile. Put outputs/ on a gp3 volume with 1,000 MB/s: "
            "its default is 125.",
        )
    else:
        yield CheckResult("disk speed", text)


def memory(settings: Settings) -> Iterator[CheckResult]:
    """Compare the host memory with the model in float32, the most that one process has in memory:
    random weights, or the merged model."""
    total = host_memory()
    if total is None:
        return
    needed = 4 * (_parameters(settings) or 0)
    text = (
        f"{show_size(total)}, the model in float32 is {show_size(needed)}"
        if needed
        else show_size(total)
    )
    if total >= needed:
        yield CheckResult("host memory", text)
    else:
        yield note(
            "host memory",
            f"{text}. A stage that loads all of it would be killed. Use a larger machine or a "
            "smaller model.",
        )


def training_memory(settings: Settings) -> Iterator[CheckResult]:
    """Compare what a rank of the training needs, as `make plan` forecasts it, with its device's
    memory."""
    shape, place = shape_here(settings), place_of(settings)
    if shape is None:
        return  # config.json is not on this machine yet
    need = in_all(need_of(shape, settings, place).bytes, settings, place)
    text = f"{show_size(need)} planned"
    if place.device_memory is None:
        yield CheckResult("training memory", f"{text}; this device's memory is not known")
    elif need <= place.device_memory:
        yield CheckResult("training memory", f"{text}, of {show_size(place.device_memory)}")
    else:
        yield note(
            "training memory",
            f"{text}, above the {show_size(place.device_memory)} of {place.name}. "
            f"{remedy(settings, shape, place)} (`make plan` has the parts)",
        )


def _parameters(settings: Settings) -> int | None:
    try:
        return parameters(settings)
    except InputError:
        return None  # `model_source` reports it


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
