"""AdamW and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch

from stages.backends.device import device_of
from stages.run.settings import Settings


def adamw(model: torch.nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW over the model's parameters; weight decay only on matrices, not on norms and biases."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=device_of(settings).fused_adamw,
    )


def learning_rate(step: int, total: int, settings: Settings) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total`.

    It rises linearly from 0 over WARMUP_STEPS, then follows LR_SCHEDULER_TYPE. The rates are those
    of transformers' schedules of the same names (optimization.py), and so those on Neuron.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return settings.learning_rate * shape[settings.lr_scheduler_type]
