"""One process of a training on Neuron: `torchrun ... -m stages.backends.neuron.worker`.

train and precompile start it. It builds optimum-neuron's training model, gives NeuronTrainer the
packed sequences in the order of every backend, and writes checkpoints, metrics.jsonl and, at the
end, the sharded weights to the work folder. Under neuron_parallel_compile only the graphs of the
process are collected: it computes nothing, so its metrics have no meaning.

Documents in a sequence attend to each other here: Neuron's attention takes no mask but the causal
one (recompute_causal_mask).
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, PrinterCallback, set_seed

from stages.backends.neuron.arguments import attention_implementation
from stages.backends.neuron.graphs_on_hub import survive_refusals
from stages.backends.neuron.metrics_callback import MetricsCallback
from stages.backends.neuron.ordered_sequences import OrderedSequences
from stages.backends.neuron.record import RecordCallback
from stages.backends.neuron.trainer import make_trainer
from stages.backends.record import RECORDS
from stages.backends.trained import trained_line
from stages.run.disk import disk_failure
from stages.run.errors import InputError, StageFailure
from stages.run.guard import die_with_parent
from stages.run.launch import report_error


@dataclass
class WorkerArguments:
    """The worker's own arguments; the rest of its command line are NeuronTrainingArguments.

    The worker reads no settings from the environment.
    """

    base: str  # model folder: config.json and safetensors
    data: str  # folder that the data stage published
    work: str  # folder for checkpoints, metrics and, at the end, saved/
    first_step: int = 0  # steps that an interrupted training had done
    lora_r: int = 0  # rank of the adapters; 0 trains all weights
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_target_modules: str = ""  # separated by spaces


def main() -> None:
    """Train as the command line says.

    The exit status is 0, or that of an InputError or StageFailure, or 1 with a traceback.
    """
    die_with_parent()
    # Warnings about the scheduler, because its optimizer is replaced: trainer.py says why.
    warnings.filterwarnings(
        "ignore", "Seems like `optimizer.step|Detected call of `lr_scheduler.step"
    )
    from optimum.neuron import NeuronTrainingArguments

    dataclasses: Any = (WorkerArguments, NeuronTrainingArguments)
    # Upstream warns at every start about what it does on purpose. The flag is added here, because
    # neuron_parallel_compile has an option of that name.
    command_line = [*sys.argv[1:], "--log_level", "error"]
    own, arguments = HfArgumentParser(dataclasses).parse_args_into_dataclasses(command_line)
    survive_refusals()
    try:
        train(own, arguments)
    except (InputError, StageFailure) as error:
        report_error(error, Path(own.work) / "error")
        _exit(error.exit_status)
    except Exception as error:
        if full := disk_failure(error, Path(own.work)):
            report_error(full, Path(own.work) / "error")
        else:
            traceback.print_exc()
        _exit(1)


def train(own: WorkerArguments, arguments: Any) -> None:
    """Train for `arguments.max_steps` steps and save the shards to `saved/` in the work folder."""
    set_seed(arguments.seed)
    work = Path(own.work)
    sequences = OrderedSequences(
        Path(own.data),
        own.first_step,
        arguments.max_steps,
        sequences_per_step=sequences_per_step(arguments),
        seed=arguments.seed,
    )
    model = build_model(own, arguments, sequences.length)
    line = trained_line(model.named_parameters(), own.lora_r)
    if os.environ.get("RANK", "0") == "0":
        print(f"{line}, in the part of the model that one core has", flush=True)
    trainer = make_trainer(model, arguments, sequences, own.first_step)
    # It prints every log as a dict; MetricsCallback prints one line.
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(
        MetricsCallback(
            work,
            own.first_step,
            sequences.count,
            sequences.sequences_per_step,
            sequences.length,
        )
    )
    if RECORDS in os.environ:
        trainer.add_callback(RecordCallback(work, model, int(os.environ.get("RANK", "0"))))
    trainer.train()
    trainer.save_model(str(work / "saved"))


def sequences_per_step(arguments: Any) -> int:
    """Sequences in the global batch of one optimizer step.

    In a pipeline optimum-neuron folds the accumulation into the batch; the product is the same.
    """
    per_rank = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return per_rank * arguments.trn_config.data_parallel_size


def build_model(own: WorkerArguments, arguments: Any, length: int) -> Any:
    """The training model on this rank's NeuronCore; with LoRA its weights are frozen."""
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
        # Without it nothing that is recomputed has a gradient.
        model.enable_input_require_grads()
    adapters = LoraConfig(
        r=own.lora_r,
        lora_alpha=own.lora_alpha,
        lora_dropout=own.lora_dropout,
        target_modules=own.lora_target_modules.split(),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapters)


def _exit(status: int) -> NoReturn:
    # Not sys.exit: at exit neuronx-distributed waits for the other ranks, which wait for this one.
    # torchrun ends them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
