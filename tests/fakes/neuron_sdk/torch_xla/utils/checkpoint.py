"""Recomputation of activations in the backward pass."""

from __future__ import annotations

from typing import Any

import torch.utils.checkpoint
from libneuronxla.graphs import traced


def checkpoint(function: Any, *args: Any, use_reentrant: bool = True, **kwargs: Any) -> Any:
    traced("recomputation")
    # The reentrant form loses a nested one's gradients when no input of it needs any.
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
