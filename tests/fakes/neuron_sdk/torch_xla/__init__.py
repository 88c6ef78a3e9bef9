"""torch_xla on a CPU: tensors are computed at once, so a step needs no marking; collectives go over
gloo."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

__version__ = "2.8.0"

_ones = torch.ones


def _ones_on_the_device(*size: Any, device: Any = None, **more: Any) -> torch.Tensor:
    return _ones(*size, device="cpu" if str(device).startswith("xla") else device, **more)


# eager attention makes its mask with device="xla", a name that only torch does not know
torch.ones = _ones_on_the_device


def _gloo(store: Any, rank: int, size: int, timeout: Any) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


dist.Backend.register_backend("xla", _gloo, devices=["cpu"])


def device(index: int | None = None) -> torch.device:
    return torch.device("cpu")


def sync(wait: bool = False) -> None:
    from torch_xla.core import xla_model

    xla_model.mark_step()
