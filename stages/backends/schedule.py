"""The numbers that follow from the settings: world size, global batch, steps.

They are printed with their arithmetic.
"""

from __future__ import annotations

import math

from stages.run.settings import Settings


def data_parallel_size(settings: Settings) -> int:
    """Groups of processes that each have a complete model and read different sequences."""
    return settings.nproc_per_node // (
        settings.tensor_parallel_size * settings.pipeline_parallel_size
    )


def sequences_per_step(settings: Settings) -> int:
    """Sequences in the global batch of one optimizer step."""
    return (
        settings.per_device_train_batch_size
        * settings.gradient_accumulation_steps
        * data_parallel_size(settings)
    )


def total_steps(settings: Settings, sequences: int) -> int:
    """Optimizer steps of a complete training on `sequences` packed sequences.

    MAX_STEPS if it is set; else every sequence is read at least NUM_TRAIN_EPOCHS times.
    """
    if settings.max_steps > 0:
        return settings.max_steps
    return math.ceil(sequences * settings.num_train_epochs / sequences_per_step(settings))


def derivation(settings: Settings, sequences: int) -> list[str]:
    """Each derived number with its arithmetic, one line each."""
    s, batch, replicas = settings, sequences_per_step(settings), data_parallel_size(settings)
    steps = total_steps(settings, sequences)
    steps_arithmetic = (
        f"ceil({sequences:,} sequences x {s.num_train_epochs:g} epochs / {batch})"
        if s.max_steps < 0
        else f"MAX_STEPS={s.max_steps}"
    )
    pipeline = (
        f"x pipeline parallel {s.pipeline_parallel_size} " if s.pipeline_parallel_size > 1 else ""
    )
    weights = (
        f"random, from config.json and SEED={s.seed}"
        if s.init_weights == "random"
        else "pretrained"
    )
    return [
        f"weights          {weights} (MODEL_ID={s.model_id})",
        f"world size       {s.nproc_per_node} = tensor parallel {s.tensor_parallel_size} "
        f"{pipeline}x data parallel {replicas}",
        f"global batch     {batch:,} sequences = {s.per_device_train_batch_size} per device "
        f"x {s.gradient_accumulation_steps} accumulation x {replicas} data parallel "
        f"= {batch * s.max_length:,} tokens, {s.max_length:,} a sequence",
        f"steps per epoch  {sequences / batch:,.2f} = {sequences:,} sequences / {batch}",
        f"total steps      {steps:,} = {steps_arithmetic}; {steps * batch * s.max_length:,} tokens",
        *_warmup(settings, steps),
    ]


def _warmup(settings: Settings, steps: int) -> list[str]:
    """What a warm-up does to the first steps, or that the training ends before its peak."""
    warmup, peak = settings.warmup_steps, f"LEARNING_RATE={settings.learning_rate:g}"
    if not warmup:
        return []
    first = "the first step has the learning rate 0 and changes no weight"
    if warmup < steps:
        return [f"warm-up          {first}; step {warmup + 1:,} has {peak} (WARMUP_STEPS={warmup})"]
    return [
        f"warm-up          WARMUP_STEPS={warmup} is not below the {steps:,} steps: {first}, and "
        f"{peak} is never reached. Set fewer."
    ]
