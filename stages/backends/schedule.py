"""The numbers that follow from the settings: world size, global batch, steps. Printed with their arithmetic."""

from __future__ import annotations

import math

from stages.run.settings import Settings


def data_parallel_size(settings: Settings) -> int:
    """Groups of processes that each hold a whole model and read other sequences."""
    return settings.nproc_per_node // (
        settings.tensor_parallel_size * settings.pipeline_parallel_size
    )


def sequences_per_step(settings: Settings) -> int:
    """Rows in the global batch of one optimizer step."""
    return (
        settings.per_device_train_batch_size
        * settings.gradient_accumulation_steps
        * data_parallel_size(settings)
    )


def total_steps(settings: Settings, rows: int) -> int:
    """Optimizer steps of a whole training over `rows` packed rows: every row at least NUM_TRAIN_EPOCHS times."""
    if settings.max_steps > 0:
        return settings.max_steps
    return math.ceil(rows * settings.num_train_epochs / sequences_per_step(settings))


def derivation(settings: Settings, rows: int) -> list[str]:
    """Each derived number and where it comes from, a line each."""
    s, batch = settings, sequences_per_step(settings)
    steps = total_steps(settings, rows)
    of_epochs = (
        f"ceil({rows:,} rows x {s.num_train_epochs} epochs / {batch})"
        if s.max_steps < 0
        else f"MAX_STEPS={s.max_steps}"
    )
    pipeline = (
        f"x pipeline parallel {s.pipeline_parallel_size} " if s.pipeline_parallel_size > 1 else ""
    )
    return [
        f"world size       {s.nproc_per_node} = tensor parallel {s.tensor_parallel_size} {pipeline}x data parallel {data_parallel_size(s)}",
        f"global batch     {batch:,} rows = {s.per_device_train_batch_size} per device x {s.gradient_accumulation_steps} accumulation "
        f"x {data_parallel_size(s)} data parallel = {batch * s.max_length:,} tokens of {s.max_length:,} a row",
        f"steps per epoch  {rows / batch:,.2f} = {rows:,} rows / {batch}",
        f"total steps      {steps:,} = {of_epochs}; {steps * batch * s.max_length:,} tokens",
    ]
