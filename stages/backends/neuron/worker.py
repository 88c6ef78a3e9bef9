"""One process of a training on Neuron: `torchrun ... -m stages.backends.neuron.worker`, started by train and precompile.

Builds optimum-neuron's training model, gives NeuronTrainer the packed rows in the order that every backend uses, and leaves in
the work folder checkpoints, metrics.jsonl and, when it ends, the sharded weights. Under neuron_parallel_compile the same process
only has its graphs collected: it computes nothing, so no figure of it means anything.

Documents in a row see each other here: Neuron's attention takes no mask but the causal one (recompute_causal_mask).
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import HfArgumentParser, PrinterCallback, set_seed

from stages.backends.batches import PackedSequences, sequences_of_step
from stages.backends.neuron.arguments import attention_implementation
from stages.backends.neuron.metrics_callback import MetricsCallback
from stages.backends.neuron.trainer import make_trainer
from stages.run.disk import disk_failure
from stages.run.errors import InputError, StageFailure
from stages.run.guard import die_with_parent
from stages.run.launch import report_error
from stages.run.layout import IGNORED_LABEL, TRAIN_SPLIT


@dataclass
class WorkerArguments:
    """The worker's own arguments; the rest of its command line are NeuronTrainingArguments. It takes no setting from elsewhere."""

    base: str  # model folder: config.json and safetensors
    data: str  # folder that the data stage published
    work: str  # folder for checkpoints, metrics and, at the end, saved/
    first_step: int = 0  # steps that an interrupted training had done
    lora_r: int = 0  # rank of adapters; 0 = all weights are trained
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_target_modules: str = ""  # separated by spaces


def main() -> None:
    """Train as the command line says; the exit status is 0, that of an InputError or StageFailure, or 1 with a traceback."""
    die_with_parent()
    # Of the scheduler, whose optimizer is another one than it was made for: trainer.py says why.
    warnings.filterwarnings(
        "ignore", "Seems like `optimizer.step|Detected call of `lr_scheduler.step"
    )
    from optimum.neuron import NeuronTrainingArguments

    dataclasses: Any = (WorkerArguments, NeuronTrainingArguments)
    # Upstream warns at every start of what it does on purpose. The flag is not in the command: neuron_parallel_compile has one like it.
    given = [*sys.argv[1:], "--log_level", "error"]
    own, arguments = HfArgumentParser(dataclasses).parse_args_into_dataclasses(given)
    try:
        train(own, arguments)
    except (InputError, StageFailure) as error:
        report_error(error, Path(own.work) / "error")
        _leave(error.exit_status)
    except Exception as error:
        if full := disk_failure(error, Path(own.work)):
            report_error(full, Path(own.work) / "error")
        else:
            traceback.print_exc()
        _leave(1)


def train(own: WorkerArguments, arguments: Any) -> None:
    """Train for `arguments.max_steps` steps and save the shards to `saved/` in the work folder."""
    set_seed(arguments.seed)
    rows = OrderedSequences(
        Path(own.data),
        own.first_step,
        arguments.max_steps,
        sequences_per_step=sequences_per_step(arguments),
        seed=arguments.seed,
    )
    trainer = make_trainer(
        build_model(own, arguments, rows.length), arguments, rows, own.first_step
    )
    trainer.remove_callback(
        PrinterCallback
    )  # prints every log as a dict; MetricsCallback says it in a line
    trainer.add_callback(
        MetricsCallback(
            Path(own.work), own.first_step, rows.count, rows.sequences_per_step, rows.length
        )
    )
    trainer.train()
    trainer.save_model(str(Path(own.work) / "saved"))


def sequences_per_step(arguments: Any) -> int:
    """Rows in the global batch of one optimizer step. (In a pipeline the library folds the accumulation into the batch.)"""
    per_rank = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return per_rank * arguments.trn_config.data_parallel_size


def build_model(own: WorkerArguments, arguments: Any, length: int) -> Any:
    """The training model on this rank's NeuronCore, its weights frozen below adapters where they alone are trained."""
    from optimum.neuron.models.training import NeuronModelForCausalLM

    attention = attention_implementation(length)
    model = NeuronModelForCausalLM.from_pretrained(
        own.base,
        arguments.trn_config,
        dtype=torch.bfloat16,
        attn_implementation=attention,
        trust_remote_code=False,
    )
    if not own.lora_r:
        return model
    from optimum.neuron.peft import get_peft_model
    from peft import LoraConfig

    if arguments.gradient_checkpointing:
        model.enable_input_require_grads()  # else nothing that is recomputed has a gradient
    adapters = LoraConfig(
        r=own.lora_r,
        lora_alpha=own.lora_alpha,
        lora_dropout=own.lora_dropout,
        target_modules=own.lora_target_modules.split(),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapters)


class OrderedSequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The packed rows of steps `first` to `first + steps` one after another: rank r of n data-parallel ranks takes every n-th.

    An item: int64 `input_ids`, `attention_mask`, `labels`, [length] each. The labels are those of the torch backend's loss: the
    first token of a document is predicted by nothing.
    """

    def __init__(self, data: Path, first: int, steps: int, *, sequences_per_step: int, seed: int):
        self._table = PackedSequences(data / TRAIN_SPLIT)
        self.count, self.sequences_per_step = len(self._table), sequences_per_step
        self.order = np.concatenate(
            [
                sequences_of_step(first + step, sequences_per_step, self.count, seed)
                for step in range(steps)
            ]
        )
        self.length = len(self[0]["input_ids"])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = {
            name: column[0]
            for name, column in self._table.batch(self.order[[index]], torch.device("cpu")).items()
        }
        labels = row["labels"].masked_fill(row["position_ids"] == 0, IGNORED_LABEL)
        return {
            "input_ids": row["input_ids"],
            "attention_mask": torch.ones_like(row["input_ids"]),
            "labels": labels,
        }


def _leave(status: int) -> None:
    # Not sys.exit: at exit neuronx-distributed waits for the other ranks, which wait for this one. torchrun ends them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
