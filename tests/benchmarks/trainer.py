"""A finished run against transformers' Trainer: the same base model, packed sequences, settings and
number of tokens, and the held-out losses of both.

    export RECIPE=smollm2-135m
    make all
    PYTHONPATH=. .venv/bin/python tests/benchmarks/trainer.py outputs/smollm2-135m

With LORA_R, Trainer trains peft's adapter. The settings come from the environment and the recipe,
as for a stage. Ends with status 1 if the losses differ by more than 0.02.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from stages.run.settings import Settings

MOST_APART = 0.02  # nats per supervised token


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sequences as a batch; no document predicts the first token of the next one (transformers'
    DataCollatorWithFlattening)."""
    import torch

    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    batch["labels"][batch["position_ids"] == 0] = -100
    return batch


def trainer_of(settings: Settings, data: Path, work: Path, **more: Any) -> Any:
    """A Trainer of the model and the packed rows with these settings, and `more` of its own
    arguments."""
    import peft
    import torch
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from stages.backends.schedule import total_steps
    from stages.model.base import base_model_folder

    rows = load_from_disk(str(data / "train"))
    base = base_model_folder(settings)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # With its cache transformers makes no mask from position_ids: documents would see each other.
    model.config.use_cache = False
    if settings.lora_r:
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=settings.lora_r,
                lora_alpha=settings.lora_alpha,
                lora_dropout=settings.lora_dropout,
                target_modules=settings.lora_target_modules.split(),
            ),
        )
    arguments: dict[str, Any] = dict(
        output_dir=str(work),
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        max_steps=total_steps(settings, len(rows)),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        logging_steps=settings.logging_steps,
        remove_unused_columns=False,
    )
    return Trainer(
        model=model,
        args=TrainingArguments(**(arguments | more)),
        train_dataset=rows,
        data_collator=collate,
    )


def train(settings: Settings, data: Path, output: Path) -> float:
    """Train with Trainer, save the model to `output`; seconds of the training."""
    import torch

    trainer = trainer_of(settings, data, output / "work")
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trained = trainer.model.merge_and_unload() if settings.lora_r else trainer.model
    trained.to(torch.bfloat16 if settings.bf16 else torch.float32).save_pretrained(output)
    return seconds


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(run: Path) -> None:
    from stages.backends.evaluate import validation_losses

    settings = Settings.read()
    ours, trained = (
        json.loads((run / stage / "manifest.json").read_text()) for stage in ("eval", "train")
    )
    with tempfile.TemporaryDirectory() as folder:
        seconds = train(settings, run / "data", Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        losses = validation_losses(settings, run / "data" / "validation", Path(folder))
    loss, base = ours["metrics"]["fine_tuned"]["loss"], ours["metrics"]["base"]["loss"]
    print(f"\n{'':14}{'base':>9}{'tuned':>9}{'seconds':>10}{'memory':>9}   (of the process)")
    print(f"{'this project':14}{base:9.4f}{loss:9.4f}{trained['seconds']:10.0f}")
    print(
        f"{'Trainer':14}{losses.base:9.4f}{losses.fine_tuned:9.4f}{seconds:10.0f}"
        f"{peak / 1e9:7.1f}GB"
    )
    apart = abs(losses.fine_tuned - loss)
    print(f"apart: {apart:.4f} nats, {'within' if apart <= MOST_APART else 'above'} {MOST_APART}")
    sys.exit(apart > MOST_APART)


if __name__ == "__main__":
    main()
