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

from stages.backends.neuron.arguments import attention_implementation
from stages.backends.neuron.figures import FiguresCallback
from stages.backends.neuron.trainer import make_trainer
from stages.backends.rows import PackedRows, rows_of_step
from stages.backends.steps import rows_per_step
from stages.run.errors import InputError, StageFailure
from stages.run.launch import die_with_parent, end_with_stage, report_error
from stages.run.settings import Settings
from stages.text.saved_rows import IGNORED_LABEL


@dataclass
class Places:
    """The worker's own arguments; the rest of its command line are NeuronTrainingArguments."""

    base: str  # model folder: config.json and safetensors
    data: str  # folder that the data stage published
    work: str  # folder for checkpoints, metrics and, at the end, saved/
    first_step: int = 0  # steps that an interrupted training had done


def main() -> None:
    """Train as the command line says; the exit status is 0, that of an InputError or StageFailure, or 1 with a traceback."""
    die_with_parent()
    end_with_stage()  # torchrun and neuron_parallel_compile outlive a stage that is killed
    # Of the scheduler, whose optimizer is another one than it was made for: trainer.py says why.
    warnings.filterwarnings("ignore", "Seems like `optimizer.step|Detected call of `lr_scheduler.step")
    from optimum.neuron import NeuronTrainingArguments

    dataclasses: Any = (Places, NeuronTrainingArguments)
    places, arguments = HfArgumentParser(dataclasses).parse_args_into_dataclasses()
    try:
        train(Settings.read(), places, arguments)
    except (InputError, StageFailure) as error:
        report_error(error, Path(places.work) / "error")
        _leave(error.exit_status)
    except Exception:
        traceback.print_exc()
        _leave(1)


def train(settings: Settings, places: Places, arguments: Any) -> None:
    """Train for `arguments.max_steps` steps and save the shards to `saved/` in the work folder."""
    set_seed(settings.seed)
    work = Path(places.work)
    rows = OrderedRows(settings, Path(places.data), places.first_step, arguments.max_steps)
    trainer = make_trainer(build_model(settings, places.base, arguments), arguments, rows, places.first_step)
    trainer.remove_callback(PrinterCallback)  # prints every log as a dict; FiguresCallback says it in a line
    trainer.add_callback(FiguresCallback(settings, work, len(rows.table), places.first_step))
    trainer.train()
    trainer.save_model(str(work / "saved"))


def build_model(settings: Settings, base: str, arguments: Any) -> Any:
    """The training model of `base` on this rank's NeuronCore, its weights frozen below adapters where LORA_R asks for them."""
    from optimum.neuron.models.training import NeuronModelForCausalLM

    model = NeuronModelForCausalLM.from_pretrained(
        base, arguments.trn_config, dtype=torch.bfloat16, attn_implementation=attention_implementation(settings.max_length)
    )
    if not settings.lora_r:
        return model
    from optimum.neuron.peft import get_peft_model
    from peft import LoraConfig

    if arguments.gradient_checkpointing:
        model.enable_input_require_grads()  # else nothing that is recomputed has a gradient
    adapters = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules.split(),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapters)


class OrderedRows(torch.utils.data.Dataset):
    """The packed rows of steps `first` to `first + steps` one after another: rank r of n data-parallel ranks takes every n-th.

    An item: int64 `input_ids`, `attention_mask`, `labels`, [MAX_LENGTH] each. The labels are those of the torch backend's loss: the
    first token of a document is predicted by nothing.
    """

    def __init__(self, settings: Settings, data: Path, first: int, steps: int):
        self.table = PackedRows(data / "train")
        count = rows_per_step(settings)
        self.order = np.concatenate([rows_of_step(first + step, count, len(self.table), settings.seed) for step in range(steps)])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = {name: column[0] for name, column in self.table.batch(self.order[[index]], torch.device("cpu")).items()}
        labels = row["labels"].masked_fill(row["position_ids"] == 0, IGNORED_LABEL)
        return {"input_ids": row["input_ids"], "attention_mask": torch.ones_like(row["input_ids"]), "labels": labels}


def _leave(status: int) -> None:
    # Not sys.exit: at exit neuronx-distributed waits for the other ranks, which wait for this one. torchrun ends them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
