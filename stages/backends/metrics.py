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


class Metrics:
    """The file, open for lines. For a run that goes on behind step `first` it drops the lines after that.

    Every rank may hold one; the one that `writes` is the logging rank.
    """

    def __init__(self, path: Path, first: int, writes: bool):
        self._path, self._writes = path, writes
        if writes:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first]
            path.write_text("".join(kept), encoding="utf-8")

    def write(self, figures: dict[str, Any]) -> None:
        if self._writes:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")


def require_finite(step: int, figures: dict[str, float], last_checkpoint: Callable[[], int]) -> None:
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
    """The figures of the last step logged."""
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
