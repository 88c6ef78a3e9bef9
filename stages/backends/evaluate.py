"""Validation loss of the base model, of the fine-tuned model and, with QUANTIZE, of the one with
quantised weights, in one process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stages.backends.batches import PackedSequences
from stages.backends.device import device_of
from stages.backends.loss import loss_sum, supervised
from stages.model.base import base_model_folder
from stages.model.size import parameters
from stages.run.cost import dollars, hourly_price
from stages.run.host import computes_bfloat16, host_memory
from stages.run.progress import Progress, duration, show_size
from stages.run.settings import Settings

# Losses that take longer than this are announced. On Neuron they are measured on the host's CPU
# while the whole instance is paid for.
LONG = 600.0


class Losses(NamedTuple):
    """Mean cross-entropy in nats per supervised token, and the dtype that all were computed in.

    `quantized`: of the fine-tuned model with the weights of QUANTIZE; None where that is none.
    """

    base: float
    fine_tuned: float
    dtype: str
    quantized: float | None = None


def validation_losses(settings: Settings, split: Path, tuned: Path) -> Losses:
    """The losses on at most the first EVAL_MAX_DOCUMENTS sequences of the folder `split`."""
    sequences = PackedSequences(split)
    count = min(len(sequences), settings.eval_max_documents)
    device = device_of(settings).eager_device()
    dtype, reason = loss_dtype(settings, device)
    name = str(dtype).removeprefix("torch.")
    print(f"losses on {device.type} in {name}: {reason}", flush=True)
    models = [(base_model_folder(settings), "none"), (tuned, "none")]
    if settings.quantize != "none":
        models.append((tuned, settings.quantize))
    with Progress("validation", len(models) * count, "sequences") as progress:
        base, fine_tuned, *quantized = (
            _mean_loss(folder, quantize, sequences, count, settings, progress, device, dtype)
            for folder, quantize in models
        )
    return Losses(base, fine_tuned, name, *quantized)


def loss_dtype(settings: Settings, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the models whose losses are measured, and why.

    A CPU without instructions for bfloat16 takes about three times as long in it as in float32
    (a linear layer of 2,048 x 2,048 with oneDNN held to AVX-512 without them: 229 and 82 ms).
    """
    if not settings.bf16:
        return torch.float32, "BF16=0"
    if device.type != "cpu" or (computes := computes_bfloat16()):
        return torch.bfloat16, "BF16=1"
    if computes is None:
        return torch.bfloat16, "BF16=1, and whether this CPU computes it is not known"
    needed, memory = 4 * parameters(settings), host_memory() or 0
    if 2 * needed > memory:
        return torch.bfloat16, (
            "BF16=1. This CPU has no instructions for it, which is slow, but in float32 the model "
            f"would take {show_size(needed)} of {show_size(memory)}"
        )
    return torch.float32, "this CPU has no instructions for bfloat16 and is faster in float32"


def load_for_evaluation(folder: Path, dtype: torch.dtype | str, device: torch.device) -> Any:
    """The model in `folder` as transformers loads it; `dtype`: "auto" for that of its weights."""
    from transformers import AutoModelForCausalLM, GenerationConfig

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
    return model.to(device)


@torch.no_grad()
def _mean_loss(
    folder: Path,
    quantize: str,
    sequences: PackedSequences,
    count: int,
    settings: Settings,
    progress: Progress,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    model = load_for_evaluation(folder, dtype, device)
    if quantize == "int8":
        from stages.backends.torch.int8 import quantise

        quantise(model)
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
    """What `count` losses of each of two models will cost, as a line; empty where less than LONG.

    `seconds` are those of the first loss, `price` is in USD per hour.
    """
    total, few = 2 * count * seconds, max(1, int(LONG / (2 * seconds)))
    if total <= LONG or few >= count:
        return ""

    def cost(of: float) -> str:
        return duration(of) + (f" and {dollars(of, price):.2f} USD" if price else "")

    return (
        f"note: the losses of {count} sequences take about {cost(total)} here, estimated from the "
        f"first one. EVAL_MAX_DOCUMENTS={few} takes about {cost(2 * few * seconds)}: interrupt and "
        "set it, or run eval on another machine."
    )
