"""Rehearsals of one rank with optimum-neuron, all in one process group: with nothing wrong, and
with a fault planted.

    torchrun ... -m tests.backends.neuron.planted_faults FOLDER

FOLDER has jobs.json: name -> [fault, the worker's command line]. Each job leaves in its work folder
what a rehearsal compares.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from optimum.neuron.models.training.llama import modeling_llama
from transformers import HfArgumentParser, TrainerCallback

from stages.backends.neuron import ordered_sequences, trainer, worker


class LosesGradients(TrainerCallback):
    """Half of the ranks have no gradients."""

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        if dist.get_rank() >= dist.get_world_size() // 2:
            for parameter in model.parameters():
                for gradient in (parameter.grad, getattr(parameter, "main_grad", None)):
                    if gradient is not None:
                        gradient.zero_()


class Drifts(TrainerCallback):
    """After a step the ranks' copies of a norm are not the same."""

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight.add_(0.01 * dist.get_rank())


class SumsNothing(TrainerCallback):
    """In the place of the callback that sums gradients over tensor-parallel ranks."""


def with_callback(callback: TrainerCallback) -> Any:
    def make(*given: Any) -> Any:
        made = MAKE(*given)
        made.add_callback(callback)
        return made

    return make


def with_frozen_rate(*given: Any) -> Any:
    """A trainer whose scheduler changes groups that the optimizer does not read."""
    made = MAKE(*given)
    setup = made.setup_training

    def setup_and_lose(*args: Any, **kwargs: Any) -> None:
        setup(*args, **kwargs)
        nothing = torch.nn.Parameter(torch.zeros(1))
        others = [{**group, "params": [nothing]} for group in made.optimizer.param_groups[:1]]
        others += [{**group, "params": []} for group in made.optimizer.param_groups[1:]]
        made.lr_scheduler.optimizer = torch.optim.SGD(others, lr=1.0)

    made.setup_training = setup_and_lose
    return made


def swapped(*given: Any) -> Any:
    """A model in which ranks have each other's part of a matrix."""
    model = BUILD(*given)
    weight = next(p for name, p in model.named_parameters() if name.endswith("down_proj.weight"))
    parts = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, weight.detach())
    with torch.no_grad():
        weight.copy_(parts[dist.get_rank() ^ 1])
    return model


def seeing_ahead(*given: Any, **more: Any) -> Any:
    """Attention without the causal mask."""
    return ATTENTION(*given, **{**more, "causal": False})


def shifted(self: Any, index: int) -> Any:
    item = ITEM(self, index)
    return {**item, "labels": torch.roll(item["labels"], -1)}


MAKE, BUILD = worker.make_trainer, worker.build_model
ATTENTION = modeling_llama.eager_attention_forward
ITEM = ordered_sequences.OrderedSequences.__getitem__
# The object, its name and what stands there. Other faults are in a job's command line.
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "half of the ranks' gradients are not summed": (
        *(worker, "make_trainer"),
        with_callback(LosesGradients()),
    ),
    "norms are not summed over the sequence's parts": (trainer, "SumsMainGradients", SumsNothing),
    "the learning rate never changes after step 1": (worker, "make_trainer", with_frozen_rate),
    "tokens see those after them": (modeling_llama, "eager_attention_forward", seeing_ahead),
    "labels are shifted twice": (ordered_sequences.OrderedSequences, "__getitem__", shifted),
    "a shard is another rank's": (worker, "build_model", swapped),
    "norms drift between ranks": (worker, "make_trainer", with_callback(Drifts())),
}


@contextmanager
def planted(fault: str) -> Iterator[None]:
    with ExitStack() as stack:
        if fault in FAULTS:
            stack.enter_context(patch.object(*FAULTS[fault]))
        yield


def main(folder: str) -> None:
    from optimum.neuron import NeuronTrainingArguments

    os.environ["TRN_TUNE_RECORD"] = "inf"
    parser = HfArgumentParser((worker.WorkerArguments, NeuronTrainingArguments))  # type: ignore[arg-type]
    for fault, command_line in json.loads((Path(folder) / "jobs.json").read_text()).values():
        own, arguments = parser.parse_args_into_dataclasses([*command_line, "--log_level", "error"])
        with planted(fault):
            worker.train(own, arguments)
        dist.barrier()
    worker._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
