"""metrics.jsonl: one line of metrics per logged step, the same on every backend.

`step` (from 1), `epoch`, `loss` (nats per supervised token), `learning_rate`, `grad_norm`,
`tokens_per_second` (of all ranks together) and, where a backend computes it, `validation_loss`; on
torch the last line has `peak_memory_bytes`, of the rank with the most.
On torch `loss` is the loss of that step, over all tokens of its global batch. On Neuron it is the
mean over the steps since the last line, and over the means of the data-parallel ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.run.errors import StageFailure
from stages.run.fsync import flush


class Metrics:
    """The file, open for appending. Opening drops the lines of steps after `first`.

    A run that resumes after step `first` writes those steps again. Every rank may have a Metrics;
    only the logging rank's `writes`.
    """

    def __init__(self, path: Path, first: int, writes: bool):
        self._path, self._writes = path, writes
        if writes:
            lines = (
                path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                if path.exists()
                else []
            )
            complete = [(line, _metrics(line)) for line in lines if line.endswith("\n")]
            kept = [line for line, metrics in complete if metrics and metrics["step"] <= first]
            path.write_text("".join(kept), encoding="utf-8")

    def write(self, metrics: dict[str, Any]) -> None:
        if self._writes:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")

    def flush(self) -> None:
        """Wait until the lines are on the disk, so that a power cut cannot leave weights on it
        without the metrics of the steps that led to them."""
        if self._writes:
            flush(self._path)


def require_finite(
    step: int, metrics: dict[str, float], last_checkpoint: Callable[[], int]
) -> None:
    """Raise StageFailure when the loss or the gradient norm of step `step` is not finite.

    `last_checkpoint` returns the step of the last checkpoint, 0 if there is none.
    """
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        return
    numbers = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
    last = last_checkpoint()
    checkpoint = (
        f"The checkpoint of step {last} is kept." if last else "There is no checkpoint yet."
    )
    raise StageFailure(
        f"Step {step}: the loss or its gradient is not finite ({numbers}). {checkpoint} "
        "Lower LEARNING_RATE, raise WARMUP_STEPS, or look for broken examples in the dataset."
    )


def last_line(path: Path) -> dict[str, Any]:
    """The metrics of the last logged step; raises StageFailure when the file has none."""
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    )
    metrics = _metrics(lines[-1]) if lines else None
    if metrics is None:
        raise StageFailure(
            f"{path} does not end with the metrics of a step. Remove {path.parent} and train again."
        )
    return metrics


def lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """The metrics of the logged steps after `step`, in order; of a file that is being written."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = []
    for line in reversed(lines):  # a long training's file has little that is new
        metrics = _metrics(line) if line.endswith("\n") else None
        if metrics and metrics["step"] <= step:
            break
        found += [metrics] if metrics else []
    return found[::-1]


def _metrics(line: str) -> dict[str, Any] | None:
    """The metrics of a step from their line; None if a crash cut the line off."""
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return metrics if isinstance(metrics, dict) and type(metrics.get("step")) is int else None
