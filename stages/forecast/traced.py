"""What a traced step of the real worker keeps for its backward pass, cached for later plans.

The trace is a process of its own that needs torch (`stages.forecast.trace`); this module only
starts it where it is asked for, and reads what it left. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from stages.forecast.machine import Place
from stages.run.json_file import write_json
from stages.run.layout import CONFIG_FILE
from stages.run.settings import Settings

TRACES = Path("outputs/.cache/traces")
# The settings that change the memory of a step.
_SHAPING = (
    *("max_length", "per_device_train_batch_size", "nproc_per_node", "tensor_parallel_size"),
    *("bf16", "gradient_checkpointing"),
)


def traced_bytes(settings: Settings, config: Path, place: Place, make: bool = False) -> int | None:
    """Bytes of a rank's activations, logits and work when the backward pass begins.

    From the cache; with `make` a step of the model in `config` is traced where the cache has none.
    None where there is no trace, or its peak is at another moment. Not with LoRA, which torch's
    MemTracker does not follow, nor with optimum-neuron.
    """
    if settings.lora_r or place.backend != "torch":
        return None
    file = TRACES / f"{_key(settings, config, place)}.json"
    try:
        if make and not file.is_file():
            found = _trace(settings, config, place)
            _keep(file, found)
        else:
            found = json.loads(file.read_bytes())
        kinds = {name.rpartition(".")[2]: int(count) for name, count in found.items()}
        return None if kinds["GRAD"] else kinds["ACT"] + kinds["TEMP"]
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


def _keep(file: Path, found: dict[str, int]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
    except OSError as error:
        print(f"note: the trace is not kept: {file}: {error.strerror}", file=sys.stderr)


def _key(settings: Settings, config: Path, place: Place) -> str:
    try:
        model = (config / CONFIG_FILE).read_bytes()
    except OSError:
        model = b""
    code = Path(__file__).with_name("trace.py").read_bytes()
    shaping = [place.device == "neuron", *(getattr(settings, name) for name in _SHAPING)]
    whole = b"\0".join((model, code, json.dumps(shaping).encode()))
    return hashlib.sha256(whole).hexdigest()[:24]


def _trace(settings: Settings, config: Path, place: Place) -> dict[str, int]:
    """The peak bytes by kind; raises ValueError where the step cannot be traced."""
    given = {name: int(getattr(settings, name)) for name in _SHAPING}
    device = "neuron" if place.device == "neuron" else "cpu"
    command = [sys.executable, "-m", "stages.forecast.trace", str(config), f"DEVICE={device}"]
    done = subprocess.run(
        [*command, *(f"{name.upper()}={value}" for name, value in given.items())],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"note: no step could be traced: {why}", file=sys.stderr)
        raise ValueError(why)
    bytes_by_kind: dict[str, int] = json.loads(done.stdout.splitlines()[-1])["bytes"]
    return bytes_by_kind
