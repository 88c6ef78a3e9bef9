"""The XLA operations of the decoder graphs, as PyTorch computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def xla_hlo_call(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """Of the functions that are decorated so, the decoder runs those that write `update` into a
    copy of `tensor` at a corner."""

    def dynamic_update_slice(
        tensor: torch.Tensor, update: torch.Tensor, *starts: torch.Tensor
    ) -> torch.Tensor:
        corner = [int(start) for start in starts] or [0] * tensor.dim()
        # XLA moves a corner back to where the update fits.
        corner = [
            min(start, whole - part)
            for start, whole, part in zip(corner, tensor.shape, update.shape, strict=True)
        ]
        written = tensor.clone()
        written[
            tuple(
                slice(start, start + part) for start, part in zip(corner, update.shape, strict=True)
            )
        ] = update
        return written

    return dynamic_update_slice


def nki_jit(*arguments: Any, **named: Any) -> Callable[[Any], Any]:
    return lambda kernel: kernel


class RmsNorm:
    """Root mean square norm over the last dimension (arXiv:1910.07467)."""

    @staticmethod
    def apply(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, dim: int) -> torch.Tensor:
        return hidden * torch.rsqrt(hidden.pow(2).mean(dim, keepdim=True) + epsilon) * weight
