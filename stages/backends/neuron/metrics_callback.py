"""The trainer callback: progress on the screen, metrics.jsonl, and the end of a broken training."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from stages.backends.metrics import Metrics, require_finite
from stages.backends.neuron.resume import last_checkpoint
from stages.run.layout import CHECKPOINTS_FOLDER, METRICS_FILE
from stages.run.progress import Progress


class MetricsCallback(TrainerCallback):
    """Shows progress, writes metrics.jsonl, and ends a training whose loss is not finite.

    `sequences` is the number of packed sequences in the dataset, `length` is theirs in tokens.
    """

    def __init__(
        self, work: Path, first_step: int, sequences: int, sequences_per_step: int, length: int
    ):
        self.work, self.first = work, first_step
        self.sequences, self.sequences_per_step, self.length = sequences, sequences_per_step, length
        # Set by neuron_parallel_compile.
        self.collecting = os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1"

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        logs_here = bool(state.is_world_process_zero)
        total = self.first + state.max_steps
        self.progress = Progress("train", total, "steps", done=self.first, shown=logs_here)
        self.metrics = Metrics(
            self.work / METRICS_FILE, self.first, writes=logs_here and not self.collecting
        )
        self.logged_step, self.logged_at = self.first, time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        # NeuronTrainer logs the scheduler's rate of the next step. This is the one that is used.
        self.rate = float(objects["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True  # whatever LOGGING_STEPS is
            control.should_save = False  # saved/ will have the same
        # So that a checkpoint with a loss that is not finite never replaces a good one.
        control.should_log |= control.should_save
        self.progress.update(1)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if self.collecting or not logs or "loss" not in logs:
            return
        now, step = time.monotonic(), state.global_step
        tokens = (step - self.logged_step) * self.sequences_per_step * self.length
        metrics = {
            "loss": float(logs["loss"]),
            "learning_rate": self.rate,
            "grad_norm": float(logs.get("grad_norm", 0.0)),
            "tokens_per_second": tokens / (now - self.logged_at),
        }
        self.logged_step, self.logged_at = step, now
        require_finite(step, metrics, self._last_checkpoint)
        epoch = round(step * self.sequences_per_step / self.sequences, 4)
        self.metrics.write({"step": step, "epoch": epoch, **metrics})
        self.progress.update(
            0, {name: f"{value:.4g}" for name, value in metrics.items()}, line=True
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.__exit__(None, None, None)

    def _last_checkpoint(self) -> int:
        last = last_checkpoint(self.work / CHECKPOINTS_FOLDER)
        return last[0] if last else 0
