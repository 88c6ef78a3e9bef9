"""Causal attention; the kernel's layout and its block of 2,048 tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from libneuronxla.graphs import traced


def nki_flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lnc: int = 1,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = True,
    mixed_precision: bool = True,
    transpose_nki_inputs: bool = True,
    **_: Any,
) -> torch.Tensor:
    """Inputs [batch, heads, head size, sequence] when transposed, else [batch, heads, sequence,
    head size]; so is the result."""
    traced("flash attention")
    if transpose_nki_inputs:
        q, k, v = (each.transpose(2, 3) for each in (q, k, v))
    if q.shape[2] % 2048:
        raise AssertionError(f"flash attention takes blocks of 2048 tokens, not {q.shape[2]}")
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale
    )
