"""Install requirements into a virtual environment: `install.py VENV REQUIREMENTS ...`

On a machine without an NVIDIA device PyTorch's CPU build is installed (PyPI's Linux build is the
CUDA one, several GB larger). uv installs where it is on the PATH or pip can bring it (three times
as fast), else pip does.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path
from urllib.error import URLError

PYTHONS = ((3, 10), (3, 12))
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NVIDIA_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # the last is WSL's
# AWS's packages: of optimum-neuron, and of the native PyTorch beside PyTorch's CPU build.
NEURON_REQUIREMENTS, NATIVE_REQUIREMENTS = (
    "docker/requirements.txt",
    "docker/native-requirements.txt",
)
# A line of `pip config list`: global.find-links='/opt/wheels'
_PIP_OPTION = re.compile(r"^\S+\.(find-links|index-url|extra-index-url)='(.*)'$", re.MULTILINE)


def main(folder: str, *requirements: str) -> int:
    """Make the environment where there is none, and install; returns the exit status."""
    version = sys.version_info[:2]
    if not PYTHONS[0] <= version <= PYTHONS[1]:
        wanted = " to ".join(".".join(map(str, bound)) for bound in PYTHONS)
        print(
            f"error: Python {wanted} is needed, {sys.executable} is {version[0]}.{version[1]}. "
            "Set PYTHON=python3.11.",
            file=sys.stderr,
        )
        return 2
    python = Path(folder) / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    options, build = index_options(requirements)
    print(f"installing {' and '.join(requirements)} into {folder}: {build}", flush=True)
    options += [word for file in requirements for word in ("--requirement", file)]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    uv = uv_command(pip)
    if uv and subprocess.run([*uv, *options]).returncode == 0:
        return 0
    return subprocess.run([*pip, *options]).returncode


def index_options(requirements: tuple[str, ...]) -> tuple[list[str], str]:
    """Options that name package indexes besides the configured ones, and what is installed."""
    if NEURON_REQUIREMENTS in requirements:
        return ["--extra-index-url", os.environ["NEURON_PIP_INDEX"]], "AWS Neuron, about 10 GB"
    if NATIVE_REQUIREMENTS in requirements:
        indexes = (os.environ["NEURON_PIP_INDEX"], CPU_INDEX)
        options = [word for index in indexes for word in ("--extra-index-url", index)]
        return options, "PyTorch for Trainium 2 and 3"
    if any(map(os.path.exists, NVIDIA_DEVICES)):
        return [], "PyTorch's CUDA build, about 7 GB"
    if "PIP_EXTRA_INDEX_URL" in os.environ:
        return [], "PyTorch's build from PIP_EXTRA_INDEX_URL"
    if is_reachable(f"{CPU_INDEX}/torch/"):
        return ["--extra-index-url", CPU_INDEX], "PyTorch's CPU build, about 1.5 GB"
    return (
        [],
        f"1.5 GB, or 7 GB where pip finds only PyTorch's CUDA build ({CPU_INDEX} is not reached)",
    )


def is_reachable(url: str) -> bool:
    """Whether `url` answers within a few seconds."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (URLError, OSError, ValueError):
        return False


def uv_command(pip: list[str]) -> list[str]:
    """uv's command that installs what `pip` would, three times as fast; empty without uv."""
    python, *_ = pip
    uv = shutil.which("uv")
    if uv is None and subprocess.run([*pip, "uv"], capture_output=True).returncode == 0:
        uv = str(Path(python).with_name("uv"))
    if uv is None:
        return []
    # As pip does: the best version that any index has, and the indexes that pip is configured with.
    command = [uv, "pip", "install", "--quiet", "--python", python]
    command += ["--index-strategy", "unsafe-best-match"]
    configured = subprocess.run([*pip[:3], "config", "list"], capture_output=True, text=True).stdout
    for option, values in _PIP_OPTION.findall(configured):
        command += [
            word for value in values.split(r"\n") for word in (f"--{option}", value) if value
        ]
    return command


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
