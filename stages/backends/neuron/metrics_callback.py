"""What a training on Neuron says of itself: progress on the screen, metrics.jsonl, and an end when the loss is no number."""

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
    """Progress on the screen, metrics.jsonl, and an end to a training whose loss is no number."""

    def __init__(
        self, work: Path, first_step: int, rows: int, sequences_per_step: int, length: int
    ):
        self.work, self.first = work, first_step
        self.rows, self.sequences_per_step, self.length = rows, sequences_per_step, length
        self.collecting = (
            os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1"
        )  # by neuron_parallel_compile

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        logs_here = bool(state.is_world_process_zero)
        total = self.first + state.max_steps
        self.progress = Progress("train", total, "steps", done=self.first, shown=logs_here)
        self.metrics = Metrics(
            self.work / METRICS_FILE, self.first, writes=logs_here and not self.collecting
        )
        self.logged_step, self.logged_at = self.first, time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.rate = float(
            given["lr_scheduler"].get_last_lr()[0]
        )  # NeuronTrainer logs the next step's

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True  # whatever LOGGING_STEPS
            control.should_save = False  # saved/ is about to hold the same
        control.should_log |= (
            control.should_save
        )  # so that no checkpoint takes a good one's place when the loss is no number
        self.progress.update(1)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if self.collecting or not logs or "loss" not in logs:
            return
        now, step = time.monotonic(), state.global_step
        tokens = (step - self.logged_step) * self.sequences_per_step * self.length
        figures = {
            "loss": float(logs["loss"]),
            "learning_rate": self.rate,
            "grad_norm": float(logs.get("grad_norm", 0.0)),
            "tokens_per_second": tokens / (now - self.logged_at),
        }
        self.logged_step, self.logged_at = step, now
        require_finite(step, figures, self._last_checkpoint)
        self.metrics.write(
            {"step": step, "epoch": round(step * self.sequences_per_step / self.rows, 4), **figures}
        )
        self.progress.update(
            0, {name: f"{value:.4g}" for name, value in figures.items()}, line=True
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.__exit__(None, None, None)

    def _last_checkpoint(self) -> int:
        last = last_checkpoint(self.work / CHECKPOINTS_FOLDER)
        return last[0] if last else 0
