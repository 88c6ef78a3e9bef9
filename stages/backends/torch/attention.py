"""Attention over packed sequences on a CPU: each block of queries meets only the keys it may see.

torch's CPU kernel computes all pairs of positions, whatever the mask, and in a packed sequence
most pairs are of different documents. Here sequences are cut into blocks, and pairs of blocks in
which no query sees a key are left out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stages.backends.device import PACKED

BLOCK = 128  # positions; with 256 a step of the demo takes a tenth longer
# A block's keys begin at a multiple of this: oneDNN makes, and keeps, a kernel for each number of
# keys, and else there would be as many as documents have lengths.
ALIGNED = 64
# Its sequence; its queries; the keys that they see; what is added to the scores of the two: 0, or
# -inf where a query does not see a key.
Block = tuple[int, slice, slice, Tensor]


def register() -> None:
    """Let transformers know this attention as attn_implementation=PACKED."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, _attention)


def _attention(
    module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: None,
    *,
    position_ids: Tensor,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: returns [batch, length, heads, head dim]."""
    first = first_visible(position_ids, sliding_window).expand(len(queries), -1)
    if dropout:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        index = torch.arange(first.shape[1], device=first.device)
        seen = (index >= first[:, None, :, None]) & (index <= index[:, None])
        return sdpa_attention_forward(
            module, queries, keys, values, seen, dropout=dropout, scaling=scaling
        )
    return packed_attention(queries, keys, values, first, scaling).transpose(1, 2), None


def first_visible(position_ids: Tensor, window: int | None = None) -> Tensor:
    """The index of the first key that each query sees, int64 as `position_ids` [batch, length]:
    its document's first token, or the first one in its sliding window."""
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    return index - (position_ids if window is None else position_ids.clamp(max=window - 1))


@torch.library.custom_op("trn_tune::packed_attention", mutates_args=())
def packed_attention(
    queries: Tensor, keys: Tensor, values: Tensor, first: Tensor, scale: float
) -> Tensor:
    """Softmax attention in which query i of a sequence sees the keys first[i] to i.

    queries [batch, heads, length, head dim], keys and values [batch, kv heads, length, head dim],
    of one dtype; first int64 [batch, length], ascending along a sequence. Returns the context, as
    the queries. torch.compile takes it as one operation: the blocks depend on `first`.
    """
    q, each = _grouped(queries, keys) * scale, queries.shape[1] // keys.shape[1]
    context = torch.empty_like(q)
    for row, rows, seen, mask in _blocks(first, each, q.dtype):
        weights = _weights(q[row, :, rows], keys[row, :, seen], mask)
        context[row, :, rows] = torch.bmm(weights, values[row, :, seen])
    return _ungrouped(context, queries)


@packed_attention.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, first: Tensor, scale: float) -> Tensor:
    return torch.empty_like(queries, memory_format=torch.contiguous_format)


@torch.library.custom_op("trn_tune::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    gradient: Tensor, queries: Tensor, keys: Tensor, values: Tensor, first: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values. The weights are computed again: kept, they would
    grow with the square of a document's length."""
    q, each = _grouped(queries, keys) * scale, queries.shape[1] // keys.shape[1]
    incoming = _grouped(gradient, keys)
    of_queries = torch.empty_like(q)
    # A key is seen from several blocks: their gradients are summed, in float32.
    of_keys, of_values = (
        torch.zeros_like(one, dtype=torch.float32, memory_format=torch.contiguous_format)
        for one in (keys, values)
    )
    for row, rows, seen, mask in _blocks(first, each, q.dtype):
        k, some, outer = keys[row, :, seen], q[row, :, rows], incoming[row, :, rows]
        weights = _weights(some, k, mask)
        of_values[row, :, seen].add_(torch.bmm(weights.transpose(1, 2), outer))
        change = torch.bmm(outer, values[row, :, seen].transpose(1, 2))
        change = torch._softmax_backward_data(change, weights, -1, weights.dtype)
        of_keys[row, :, seen].add_(torch.bmm(change.transpose(1, 2), some))
        of_queries[row, :, rows] = torch.bmm(change, k)
    return (
        _ungrouped(of_queries.mul_(scale), queries),
        of_keys.to(keys.dtype),
        of_values.to(values.dtype),
    )


@packed_attention_backward.register_fake
def _(
    gradient: Tensor, queries: Tensor, keys: Tensor, values: Tensor, first: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    of_queries, of_keys, of_values = (
        torch.empty_like(one, memory_format=torch.contiguous_format)
        for one in (queries, keys, values)
    )
    return of_queries, of_keys, of_values


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found = packed_attention_backward(gradient, *ctx.saved_tensors, ctx.scale)
    return *found, None, None


packed_attention.register_autograd(_backward, setup_context=_keep)


def _grouped(heads: Tensor, keys: Tensor) -> Tensor:
    """[batch, heads, length, head dim] -> [batch, kv heads, length x heads of one, head dim], so
    that the queries of a block are neighbours."""
    batch, kv_heads, length, size = keys.shape
    return heads.reshape(batch, kv_heads, -1, length, size).transpose(2, 3).flatten(2, 3)


def _ungrouped(grouped: Tensor, heads: Tensor) -> Tensor:
    """What `_grouped` made of `heads`, as they are."""
    batch, kv_heads, _, size = grouped.shape
    split = grouped.view(batch, kv_heads, heads.shape[2], -1, size)
    return split.transpose(2, 3).reshape(heads.shape).contiguous()


def _blocks(first: Tensor, each: int, dtype: torch.dtype) -> list[Block]:
    """The blocks of a batch with `each` query heads for one of keys."""
    return _blocks_of(first.numpy().tobytes(), first.shape[1], each, dtype)


# The layers of a model ask for the same ones, forward and backward: with a window, and without.
@lru_cache(maxsize=2)
def _blocks_of(first: bytes, length: int, each: int, dtype: torch.dtype) -> list[Block]:
    index, blocks = torch.arange(length), []
    sequences = torch.frombuffer(bytearray(first), dtype=torch.int64).split(length)
    for row, starts in enumerate(sequences):
        for start in range(0, length, BLOCK):
            end = min(start + BLOCK, length)
            aligned = int(starts[start]) // ALIGNED * ALIGNED
            new, seen = slice(start, end), slice(aligned, end)
            hidden = (index[seen] > index[new, None]) | (index[seen] < starts[new, None])
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            blocks.append((row, slice(start * each, end * each), seen, mask[:, None]))
    return blocks


def _weights(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """The softmax of each query over the keys."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    scores.view(len(keys), len(mask), -1, mask.shape[-1]).add_(mask)
    return torch.softmax(scores, -1)
