"""Small checkpoints of the torch backend, written and resumed from in this process, which plays the
only rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from stages.backends.torch.checkpoint import resume, save_checkpoint


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpoint_of(folder: Path, step: int, keep: int = 1) -> None:
    """A checkpoint whose weights are its step."""
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, float(step))
    save_checkpoint(folder, step, model, torch.optim.SGD(model.parameters()), keep)


def resumed(folder: Path) -> tuple[int, float]:
    """The step that a training would continue from, and the weights that it would have."""
    model = torch.nn.Linear(2, 2)
    step = resume(folder, model, torch.optim.SGD(model.parameters()))
    return step, model.weight.mean().item()
