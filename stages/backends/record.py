"""What a rehearsal compares: a training's figures step by step, and digests of its tensors that
tolerate rounding.

A digest of a tensor is its norm and PROJECTIONS sums of its elements with fixed random signs. Each
has about the size of the norm, whatever the tensor's size, so a relative deviation of the digest is
about that of the tensor.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from stages.backends.decoding import seed_of
from stages.model.files import weight_files
from stages.run.layout import RECORD_FILE

PROJECTIONS = 3
# Variables of the environment, in a rehearsal's trainings: the seconds after which a training of
# one process ends with the step that it is at, and whether documents see each other.
RECORDS = "TRN_TUNE_RECORD"
TOGETHER = "TRN_TUNE_DOCUMENTS_TOGETHER"


class Record:
    """record.jsonl in a training's work folder; does nothing outside a rehearsal."""

    def __init__(self, work: Path):
        self._path = work / RECORD_FILE
        seconds = os.environ.get(RECORDS)
        self._on = seconds is not None
        self._seconds = float(seconds or math.inf)
        self._end = time.monotonic() + self._seconds
        self.isolated = TOGETHER not in os.environ
        self._gradients: dict[str, list[float]] = {}
        self._apart = 0.0

    def weights(self, model: torch.nn.Module) -> None:
        """Begin the file with the time for the steps, and the weights before the first."""
        if self._on:
            digests = {name: digest(name, tensor) for name, tensor in _parameters(model).items()}
            if dist.get_rank() == 0:
                line = {"seconds": self._seconds, "weights": digests}
                self._path.write_text(json.dumps(line) + "\n", encoding="utf-8")

    def gradients(self, model: torch.nn.Module) -> None:
        """Note the gradients, before they are clipped, and how far apart the ranks' copies of
        weights are that every rank has whole."""
        if self._on:
            parameters = _parameters(model)
            self._gradients = {
                name: digest(name, one.grad)
                for name, one in parameters.items()
                if one.grad is not None
            }
            self._apart = _apart(parameters)

    @property
    def is_late(self) -> bool:
        """Whether this training has had its time."""
        return time.monotonic() > self._end

    def step(self, number: int, figures: dict[str, float]) -> None:
        """Add a line for step `number` (from 1)."""
        if self._on and dist.get_rank() == 0:
            line = {
                "step": number,
                **{name: figures[name] for name in ("loss", "grad_norm", "learning_rate")},
                "apart": self._apart,
                "gradients": self._gradients,
            }
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


@torch.no_grad()
def digest(name: str, tensor: torch.Tensor) -> list[float]:
    """The norm and the projections of a tensor, in float32. The signs follow from `name`: r^T T c
    with a sign for each row and each column. All ranks of a mesh must call it."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    whole = whole.float()
    rows = whole.reshape(len(whole), -1) if whole.ndim > 1 else whole[None]
    found = [rows.norm()]
    for number in range(PROJECTIONS):
        generator = torch.Generator().manual_seed(seed_of(number, name))
        left, right = (
            torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(1).to(rows)
            for size in rows.shape
        )
        found.append(left @ rows @ right)
    return [float(one) for one in found]


def digests_of(model: Path) -> dict[str, list[float]]:
    """The digest of each tensor in the safetensors files of a model's folder."""
    from safetensors import safe_open

    digests = {}
    for name in weight_files(model):
        with safe_open(model / name, framework="pt") as file:
            for tensor in file.keys():  # noqa: SIM118 (not a mapping)
                digests[tensor] = digest(tensor, file.get_tensor(tensor))
    return digests


def _parameters(model: torch.nn.Module) -> dict[str, Any]:
    """The trained parameters by their names in the plain model."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def _apart(parameters: dict[str, Any]) -> float:
    """The largest difference between ranks of the sum of a weight of which each has a copy, as a
    fraction of the sum of its absolute values."""
    copies = [
        one.to_local().float()
        for one in parameters.values()
        if isinstance(one, DTensor) and isinstance(one.placements[-1], Replicate)
    ]
    mesh = next((one.device_mesh for one in parameters.values() if isinstance(one, DTensor)), None)
    if not copies or mesh is None or mesh.ndim < 2:
        return 0.0
    sums = torch.stack([copy.sum() for copy in copies]).cpu()
    sizes = torch.stack([copy.abs().sum() for copy in copies]).cpu().clamp(min=1e-12)
    largest = torch.cat([sums, -sums])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=mesh.get_group(mesh.ndim - 1))
    high, low = largest.chunk(2)
    return float(((high + low) / sizes).abs().max())
