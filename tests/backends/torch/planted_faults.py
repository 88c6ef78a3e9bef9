"""Rehearsals of one rank, all in one process group: with nothing wrong, and with a fault planted.

    torchrun ... -m tests.backends.torch.planted_faults FOLDER

FOLDER has jobs.json: name -> [fault, base model, settings], the models and the data stage's output
`data`. Each job writes its record.jsonl to FOLDER/name.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from stages.backends import loss
from stages.backends.record import Record
from stages.backends.torch import optimizer, parallel, worker
from stages.backends.torch.rank import run_rank
from stages.run.settings import Settings


def partial_norms(record: Any, model: torch.nn.Module) -> None:
    """Leave each rank with its own part of the norms' gradients, and go on."""
    share = 0.3 if dist.get_rank() % 2 else 0.7
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.grad.to_local().mul_(share)
    GRADIENTS(record, model)


def unsummed(model: torch.nn.Module, batch: Any, *more: Any, **named: Any) -> torch.Tensor:
    """The loss; on the second half of the ranks, without a gradient."""
    value = loss.loss_sum(model, batch, *more, **named)
    is_lost = dist.get_rank() >= dist.get_world_size() // 2
    return value.detach() + 0 * (value - value.detach()) if is_lost else value


def unmasked(model: torch.nn.Module, batch: Any, _: bool, alone: bool) -> torch.Tensor:
    """The loss where documents see those before them in their sequence."""
    return loss.loss_sum(model, batch, isolated=False, only_supervised=alone)


def shifted_twice(labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    once = NEXT_TOKEN_LABELS(labels, positions)
    return NEXT_TOKEN_LABELS(once, positions)


def frozen_rate(step: int, total: int, settings: Settings) -> float:
    return RATE(min(step, 1), total, settings)


def configured(**changes: Any) -> Callable[[Path], Any]:
    """Reads a config, with other values than it has."""

    def read(base: Path) -> Any:
        config = CONFIG(base)
        for name, value in changes.items():
            setattr(config, name, value)
        return config

    return read


def swapped(model: torch.nn.Module, base: Path) -> None:
    """Read the weights, then give each rank the part of a matrix that is another's."""
    READ_WEIGHTS(model, base)
    weight = model.model.layers[0].self_attn.q_proj.weight.to_local()
    parts = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, weight.detach())
    with torch.no_grad():
        weight.copy_(parts[dist.get_rank() ^ 1])


def drifting(state: Any, step: int, total: int) -> dict[str, float]:
    """A step, after which the ranks' copies of a norm are not the same."""
    figures = STEP(state, step, total)
    with torch.no_grad():
        state.model.model.norm.weight.to_local().add_(1e-3 * dist.get_rank())
    return figures


NEXT_TOKEN_LABELS, RATE = loss.next_token_labels, optimizer.learning_rate
GRADIENTS = Record.gradients
CONFIG, READ_WEIGHTS, STEP = parallel.pretrained_config, parallel._read_weights, worker.train_step
# The module, its name and what stands there.
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "half of the ranks' gradients are not summed": (worker, "loss_sum", unsummed),
    "norms are not summed over the sequence's parts": (Record, "gradients", partial_norms),
    "the learning rate never changes after step 1": (optimizer, "learning_rate", frozen_rate),
    "documents see each other": (worker, "loss_sum", unmasked),
    "labels are shifted twice": (loss, "next_token_labels", shifted_twice),
    "RoPE has another base": (parallel, "pretrained_config", configured(rope_theta=100.0)),
    "dropout is left on": (parallel, "pretrained_config", configured(attention_dropout=0.1)),
    "a shard is another rank's": (parallel, "_read_weights", swapped),
    "norms drift between ranks": (worker, "train_step", drifting),
}


@contextmanager
def planted(fault: str) -> Iterator[None]:
    with ExitStack() as stack:
        if fault:
            stack.enter_context(patch.object(*FAULTS[fault]))
        yield


def main(folder: str) -> None:
    os.environ["TRN_TUNE_RECORD"] = "inf"
    root = Path(folder)

    def work(device: torch.device) -> None:
        for name, (fault, model, changes) in json.loads((root / "jobs.json").read_text()).items():
            (root / name).mkdir(exist_ok=True)
            settings = replace(Settings.read(), **changes)
            with planted(fault):
                worker.train(settings, root / model, root / "data", root / name, -1, device)
            dist.barrier()

    run_rank(work, root / "error")


if __name__ == "__main__":
    main(*sys.argv[1:])
