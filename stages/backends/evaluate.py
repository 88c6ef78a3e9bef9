"""Validation loss of the base model and of the fine-tuned model, in one process."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from stages.backends.batches import PackedSequences
from stages.backends.loss import loss_sum, supervised
from stages.model.base import base_model_folder
from stages.run.cost import dollars, hourly_price
from stages.run.layout import VALIDATION_SPLIT
from stages.run.progress import Progress, duration
from stages.run.settings import Settings

# Losses that take longer than this are announced. On Neuron they are measured on the host's CPU
# while the whole instance is paid for.
LONG = 600.0


def validation_losses(settings: Settings, data: Path, tuned: Path) -> dict[str, float]:
    """`{"base": ..., "fine_tuned": ...}`: mean cross-entropy in nats per supervised token.

    Reads at most the first EVAL_MAX_DOCUMENTS sequences of the validation split.
    """
    sequences = PackedSequences(data / VALIDATION_SPLIT)
    count = min(len(sequences), settings.eval_max_documents)
    models = {"base": base_model_folder(settings), "fine_tuned": tuned}
    with Progress("validation", 2 * count, "sequences") as progress:
        return {
            name: _mean_loss(folder, sequences, count, settings, progress)
            for name, folder in models.items()
        }


@torch.no_grad()
def _mean_loss(
    folder: Path, sequences: PackedSequences, count: int, settings: Settings, progress: Progress
) -> float:
    from transformers import AutoModelForCausalLM, GenerationConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="sdpa",
        # Without a generation_config transformers 4.57 looks for custom_generate/generate.py in the
        # folder and runs it, whatever trust_remote_code says.
        generation_config=GenerationConfig(),
        use_safetensors=True,
        trust_remote_code=False,
    ).eval()
    model.to(device)
    loss, tokens, started = 0.0, 0, time.monotonic()
    for indices in sequences.in_order(1):
        if indices[0] >= count:
            break
        batch = sequences.batch(indices, device)
        loss += float(loss_sum(model, batch))
        tokens += int(supervised(batch["labels"], batch["position_ids"]).sum())
        progress.update(1)
        if progress.done == 1 and (
            note := cost_note(time.monotonic() - started, count, hourly_price(settings))
        ):
            print(note, flush=True)
    return loss / max(1, tokens)


def cost_note(seconds: float, count: int, price: float | None) -> str:
    """What the losses of `count` sequences will cost on both models, as a line; empty where less
    than LONG.

    `seconds` are those of the first sequence, `price` is in USD per hour.
    """
    total, few = 2 * count * seconds, max(1, int(LONG / (2 * seconds)))
    if total <= LONG or few >= count:
        return ""

    def cost(of: float) -> str:
        return duration(of) + (f" and {dollars(of, price):.2f} USD" if price else "")

    return (
        f"note: the losses of {count} held-out sequences take about {cost(total)} here, estimated "
        f"from the first one. EVAL_MAX_DOCUMENTS={few} takes about {cost(2 * few * seconds)}: "
        "interrupt and set it, or run eval on another machine."
    )
