"""One process of a training: `torchrun ... -m stages.backends.torch.worker`, started by train and
precompile.

Takes the settings from the environment, the base model and the packed rows from folders, and leaves
in the work folder checkpoints, metrics.jsonl and, when it ends, the sharded weights.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from stages.backends.batches import PackedSequences, sequences_of_step
from stages.backends.decoding import seed_of
from stages.backends.device import device_of
from stages.backends.loss import loss_sum, supervised
from stages.backends.metrics import Metrics, require_finite
from stages.backends.record import Record
from stages.backends.schedule import data_parallel_size, sequences_per_step, total_steps
from stages.backends.torch import checkpoint, lora, optimizer
from stages.backends.torch.parallel import build_model, exchange, mesh_of
from stages.backends.torch.rank import run_rank
from stages.backends.trained import trained_line
from stages.model.check import tied_weights
from stages.run.layout import (
    ADAPTER_CONFIG,
    CHECKPOINTS_FOLDER,
    METRICS_FILE,
    SHARDS_FOLDER,
    STOP_FILE,
    TRAIN_SPLIT,
    VALIDATION_SPLIT,
)
from stages.run.limits import stopped
from stages.run.progress import Progress
from stages.run.settings import Settings


@dataclass
class Training:
    """What one rank holds while it trains."""

    settings: Settings
    device: torch.device
    mesh: DeviceMesh
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    train: PackedSequences
    validation: PackedSequences | None
    record: Record

    @property
    def data_rank(self) -> int:
        return self.mesh["data"].get_local_rank()

    @property
    def only_supervised(self) -> bool:
        """Whether logits are computed for supervised tokens alone (`loss_sum`)."""
        fixed = device_of(self.settings).fixed_shapes
        return self.settings.tensor_parallel_size == 1 and not fixed


@click.command()
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    required=True,
    help="Base model: config.json and safetensors.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder that the data stage published.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for checkpoints, metrics and shards.",
)
@click.option(
    "--max-steps", type=int, required=True, help="Optimizer steps; -1 = as the settings say."
)
def main(base: Path, data: Path, work: Path, max_steps: int) -> None:
    # The gradients' norm is summed over both dimensions of the mesh one after the other, and
    # DTensor warns that this is slow.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    run_rank(
        lambda device: train(Settings.read(), base, data, work, max_steps, device), work / "error"
    )


def train(
    settings: Settings, base: Path, data: Path, work: Path, max_steps: int, device: torch.device
) -> None:
    """Train from the last whole checkpoint in `work`, or from the base model, to the last step."""
    state = _prepare(settings, base, data, work, device)
    total = max_steps if max_steps > 0 else total_steps(settings, len(state.train))
    checkpoints = work / CHECKPOINTS_FOLDER
    first = checkpoint.resume(checkpoints, state.model, state.optimizer)
    if first and dist.get_rank() == 0:
        print(f"continuing from the checkpoint of step {first:,} of {total:,}", flush=True)
    metrics = Metrics(work / METRICS_FILE, first, writes=dist.get_rank() == 0)
    state.record.weights(state.model)
    with Progress("train", total, "steps", done=first, shown=dist.get_rank() == 0) as progress:
        for step in range(first, total):
            figures = train_step(state, step, total)
            require_finite(step + 1, figures, lambda: checkpoint.last_step(checkpoints))
            done, late = step + 1, state.record.is_late
            last = done == total or late
            state.record.step(done, figures)
            measured = settings.eval_steps and (done % settings.eval_steps == 0 or last)
            if state.validation and measured:
                figures["validation_loss"] = validation_loss(state, state.validation)
            logged = done % settings.logging_steps == 0 or last
            if logged:
                metrics.write(
                    {
                        "step": done,
                        "epoch": round(done * sequences_per_step(settings) / len(state.train), 4),
                        **figures,
                        **(_peak_memory(settings) if last else {}),
                    }
                )
            progress.update(
                1, {name: f"{value:.4g}" for name, value in figures.items()}, line=logged
            )
            stop = not last and stop_is_asked(work)
            saved = stop or (settings.save_steps and done % settings.save_steps == 0)
            if saved and not last and max_steps < 0:
                metrics.flush()
                kept = settings.save_total_limit
                checkpoint.save_checkpoint(checkpoints, done, state.model, state.optimizer, kept)
            if stop:
                raise_stopped(work, f"Stopped at the checkpoint of step {done:,} of {total:,}.")
            if late:
                break
    metrics.flush()
    more = {ADAPTER_CONFIG: lora.adapter_config(settings)} if settings.lora_r else {}
    checkpoint.save_shards(work / SHARDS_FOLDER, state.model, tied_weights(base), more)


def stop_is_asked(work: Path) -> bool:
    """Whether the stage asks for an end; the same on every rank."""
    asked = torch.tensor(int(dist.get_rank() == 0 and (work / STOP_FILE).is_file()))
    dist.broadcast(asked, 0)
    return bool(asked)


def raise_stopped(work: Path, where: str) -> None:
    """Raise the error with which the stage ends this training."""
    if error := stopped(work):
        raise type(error)(f"{where} {error}")


def train_step(state: Training, step: int, total: int) -> dict[str, float]:
    """One optimizer step over global batch `step` (from 0): its loss (nats per supervised token)
    and other figures."""
    started = time.monotonic()
    settings = state.settings
    # What dropout draws follows from the step, so that a resumed training draws the same.
    torch.manual_seed(seed_of(settings.seed, f"{step} {state.data_rank}"))
    rate = optimizer.learning_rate(step, total, settings)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    rows = sequences_of_step(step, sequences_per_step(settings), len(state.train), settings.seed)
    mine = rows.reshape(data_parallel_size(settings), settings.gradient_accumulation_steps, -1)[
        state.data_rank
    ]
    batches = [state.train.batch(indices, state.device) for indices in mine]
    tokens = _sum_over_data(
        state, sum(int(supervised(b["labels"], b["position_ids"]).sum()) for b in batches)
    )
    local = torch.zeros((), device=state.device)
    for index, batch in enumerate(batches):
        exchange(state.model, last=index == len(batches) - 1)
        with loss_parallel():
            loss = loss_sum(state.model, batch, state.record.isolated, state.only_supervised)
            # FSDP averages gradients over the data-parallel ranks; the loss is a mean over the
            # whole global batch's tokens.
            (loss * (data_parallel_size(settings) / max(1, tokens))).backward()
        local += _whole(loss.detach())
    state.record.gradients(state.model)
    norm = _whole(
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), settings.max_grad_norm or math.inf)
    )
    state.optimizer.step()
    state.optimizer.zero_grad()
    loss_mean = _sum_over_data(state, float(local)) / max(1, tokens)
    seen = rows.size * settings.max_length
    return {
        "loss": loss_mean,
        "learning_rate": rate,
        "grad_norm": float(norm),
        "tokens_per_second": seen / (time.monotonic() - started),
    }


@torch.no_grad()
def validation_loss(state: Training, held_out: PackedSequences) -> float:
    """Mean loss over the held-out sequences, in nats per supervised token; the data-parallel ranks
    share them."""
    state.model.eval()
    size, ranks = state.settings.per_device_train_batch_size, data_parallel_size(state.settings)
    total, tokens = 0.0, 0
    for turn in range(math.ceil(len(held_out) / (size * ranks))):
        # FSDP and TP exchange tensors in every forward: a rank without rows left runs its last one
        # for free.
        start = (turn * ranks + state.data_rank) * size
        indices = [index for index in range(start, start + size) if index < len(held_out)]
        batch = held_out.batch(torch.tensor(indices or [0]).numpy(), state.device)
        with loss_parallel():
            loss = float(_whole(loss_sum(state.model, batch, True, state.only_supervised)))
        if indices:
            total, tokens = (
                total + loss,
                tokens + int(supervised(batch["labels"], batch["position_ids"]).sum()),
            )
    state.model.train()
    return _sum_over_data(state, total) / max(1.0, _sum_over_data(state, tokens))


def _prepare(
    settings: Settings, base: Path, data: Path, work: Path, device: torch.device
) -> Training:
    torch.manual_seed(settings.seed)
    mesh = mesh_of(settings, device)
    model = build_model(base, settings, mesh, device)
    line = trained_line(model.named_parameters(), settings.lora_r)
    if dist.get_rank() == 0:
        print(line, flush=True)
    held_out = data / VALIDATION_SPLIT
    validation = PackedSequences(held_out) if held_out.is_dir() else None
    return Training(
        settings,
        device,
        mesh,
        model,
        optimizer.adamw(model, settings),
        PackedSequences(data / TRAIN_SPLIT),
        validation,
        Record(work),
    )


def _peak_memory(settings: Settings) -> dict[str, int]:
    """The largest peak of a rank's memory until now, in bytes, the same on every rank; empty where
    the device does not say."""
    peak = device_of(settings).peak_memory()
    if peak is None:
        return {}
    largest = torch.tensor(peak)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return {"peak_memory_bytes": int(largest)}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sum_over_data(state: Training, value: float) -> float:
    """The sum over data-parallel ranks, the same number on every rank."""
    # On the CPU: not every device has float64.
    tensor = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(tensor, group=state.mesh["data"].get_group())
    return float(tensor)


if __name__ == "__main__":
    main()
