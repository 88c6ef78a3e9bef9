"""metrics.jsonl: one line of figures per logged step, whichever backend trains.

`step` (from 1), `epoch`, `loss` (nats per supervised token), `learning_rate`, `grad_norm`, `tokens_per_second` (of the whole
world), and where a backend has it `validation_loss`. On torch `loss` is that of the step, over all tokens of its global batch; on
Neuron the mean over the steps since the last line, and of means of the data-parallel ranks.
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
    """The file, open for lines. For a run that goes on behind step `first` it drops the lines after that.

    Every rank may hold one; the one that `writes` is the logging rank.
    """

    def __init__(self, path: Path, first: int, writes: bool):
        self._path, self._writes = path, writes
        if writes:
            lines = (
                path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                if path.exists()
                else []
            )
            read = [(line, _figures(line)) for line in lines if line.endswith("\n")]
            kept = [line for line, figures in read if figures and figures["step"] <= first]
            path.write_text("".join(kept), encoding="utf-8")

    def write(self, figures: dict[str, Any]) -> None:
        if self._writes:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")

    def flush(self) -> None:
        """Wait until the lines are on the disk: a power cut is not to leave weights without what was logged on the way to them."""
        if self._writes:
            flush(self._path)


def require_finite(
    step: int, figures: dict[str, float], last_checkpoint: Callable[[], int]
) -> None:
    """Raise StageFailure when step `step`'s loss or gradient is not finite; `last_checkpoint` gives a step, 0 for none."""
    if math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"]):
        return
    numbers = ", ".join(f"{name} {value:g}" for name, value in figures.items())
    kept = last_checkpoint()
    rest = f"The checkpoint of step {kept} is kept." if kept else "There is no checkpoint yet."
    raise StageFailure(
        f"Step {step}: the loss or its gradient is not finite ({numbers}). {rest} "
        f"Lower LEARNING_RATE, raise WARMUP_STEPS, or look for broken rows in the dataset."
    )


def last_line(path: Path) -> dict[str, Any]:
    """The figures of the last step logged; raises StageFailure when the file has none."""
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    )
    figures = _figures(lines[-1]) if lines else None
    if figures is None:
        raise StageFailure(
            f"{path} does not end with a step's figures. Remove {path.parent} and train again."
        )
    return figures


def _figures(line: str) -> dict[str, Any] | None:
    """A step's figures from their line; None where a crash left something else of it."""
    try:
        figures = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return figures if isinstance(figures, dict) and type(figures.get("step")) is int else None
