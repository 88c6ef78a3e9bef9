"""The two graphs of generation, as torch.export sees them: prefill reads prompts, decode one token.

Both are the forward of transformers' own model, whatever its architecture. Only the attention is
ours, because the keys and values are in tensors that the caller owns and that the graphs write in
place: two per layer, each [batch, kv heads, sequence length, head dim]. Prompts are padded on the
right and every slot has its own positions, so a batch takes prompts of any lengths: causality hides
the padding from the prompt, and decode overwrites the padding before its mask includes it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from stages.backends.torch.generate import StepName, empty_cache
from stages.backends.torch.int8 import TiedHead, int8_linear

ATTENTION = "caller_owned_cache"  # the name by which transformers calls `_attention`
# Up to this batch size a CPU decodes with `_ProductAndSum`. With SmolLM2's layers in bfloat16 it is
# 1.5 times as fast as oneDNN's product at 4, and slower at 8.
FEW_SLOTS = 4
# attend(layer's index, queries, keys, values, scale, sliding window) -> context. Tensors are
# [batch, heads, new tokens, head dim]; a window is the number of positions that a token sees, its
# own included, or None.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float, int | None], torch.Tensor]


class Step(torch.nn.Module):
    """A causal language model of transformers with the attention of this file.

    Its parameters and buffers, under their own names, are the constants of a package. Tied
    embeddings are registered once, so that they are one constant and one tensor in the file of
    weights.
    """

    def __init__(self, model: Any):
        from transformers import AttentionInterface

        super().__init__()
        AttentionInterface.register(ATTENTION, _attention)
        if model.config.tie_word_embeddings and isinstance(model.lm_head, torch.nn.Linear):
            model.lm_head = TiedHead(model.model.embed_tokens)
        self.model, self.lm_head = model.model, model.lm_head
        self._whole = [model]  # in a list: as a part of this module it would give names twice

    def logits(
        self, ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Logits [batch, vocab] of the token after token `last` [batch] of ids [batch, tokens].

        `positions` can be broadcast to the shape of `ids`.
        """
        slots = torch.arange(len(ids), device=ids.device)

        def only_last(_: Any, hidden: tuple[torch.Tensor]) -> torch.Tensor:
            return hidden[0][slots, last].unsqueeze(1)

        # The head is most of the work of a small model; the other tokens' logits are not needed.
        hook = self.lm_head.register_forward_pre_hook(only_last)
        whole = self._whole[0]
        whole.config._attn_implementation = ATTENTION
        try:
            output = whole(input_ids=ids, position_ids=positions, use_cache=False, attend=attend)
        finally:
            hook.remove()
        return output.logits[:, 0]


def _attention(
    module: Any,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: None,
    *,
    attend: Attend,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: returns [batch, new tokens, heads, head dim]."""
    context = attend(module.layer_idx, queries, keys, values, scaling, sliding_window)
    return context.transpose(1, 2), None


class _ProductAndSum(TorchFunctionMode):
    """Linear layers as a product and a sum for each of a few hidden states, in float32.

    Inductor makes one loop of them that reads every weight once, at the speed of memory; torch's
    matrix-vector product of bfloat16 is three times slower.
    """

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function in (functional.linear, int8_linear):
            function = _product_and_sum
        return function(*args, **(kwargs or {}))


def _product_and_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the two linear layers return; `scale` is of an int8 weight, and multiplies the sums."""
    rows = hidden.reshape(-1, hidden.shape[-1]).float()
    # Inductor computes the operand of as_strided before the loop. It would otherwise compute norms
    # and activations again for every row of the weight, which takes half of the time.
    rows = rows.as_strided(rows.shape, rows.stride())
    product = torch.stack([(weight * row).sum(-1) for row in rows])
    if scale is not None:
        product = product * scale
    if bias is not None:
        product = product + bias
    return product.to(hidden.dtype).reshape(*hidden.shape[:-1], len(weight))


class Prefill(Step):
    """Reads prompts into an empty cache; computes logits only for each prompt's last token."""

    def forward(
        self, ids: torch.Tensor, lengths: torch.Tensor, cache: list[torch.Tensor]
    ) -> torch.Tensor:
        """ids [batch, longest prompt], padded on the right -> logits [batch, vocab].

        `lengths` [batch] are the prompts' lengths, at least 1 (int64).
        """
        longest, sequence_length = ids.shape[1], cache[0].shape[2]
        positions = torch.arange(longest, device=ids.device)
        distance = positions.unsqueeze(1) - positions

        def attend(
            layer: int,
            queries: torch.Tensor,
            keys: torch.Tensor,
            values: torch.Tensor,
            scale: float,
            window: int | None,
        ) -> torch.Tensor:
            cache[2 * layer][:, :, :longest] = keys
            cache[2 * layer + 1][:, :, :longest] = values
            # The cache was empty: these are all the keys, so causality alone needs no mask.
            mask = None
            if window is not None and window < sequence_length:
                mask = (distance >= 0) & (distance < window)
            return functional.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=True,
            )

        return self.logits(ids, positions.unsqueeze(0), lengths - 1, attend)


class Decode(Step):
    """Reads one token per slot, at that slot's position."""

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: list[torch.Tensor]
    ) -> torch.Tensor:
        """ids [batch] -> logits of the next token [batch, vocab].

        `positions` [batch] are below the sequence length (int64).
        """
        batch, kv_heads, sequence_length, head_dim = cache[0].shape
        slots = torch.arange(batch, device=ids.device)
        distance = positions.unsqueeze(1) - torch.arange(sequence_length, device=ids.device)

        def attend(
            layer: int,
            queries: torch.Tensor,
            keys: torch.Tensor,
            values: torch.Tensor,
            scale: float,
            window: int | None,
        ) -> torch.Tensor:
            past_keys, past_values = cache[2 * layer], cache[2 * layer + 1]
            past_keys[slots, :, positions] = keys[:, :, 0]
            past_values[slots, :, positions] = values[:, :, 0]
            mask = distance >= 0
            if window is not None and window < sequence_length:
                mask = mask & (distance < window)
            # The query heads that share a KV head become its queries: grouped attention that does
            # not repeat the cache.
            grouped = queries.reshape(batch, kv_heads, -1, head_dim)
            context = functional.scaled_dot_product_attention(
                grouped, past_keys, past_values, attn_mask=mask[:, None, None], scale=scale
            )
            return context.reshape(queries.shape)

        few = batch <= FEW_SLOTS and ids.device.type == "cpu"
        with _ProductAndSum() if few else nullcontext():
            return self.logits(
                ids.unsqueeze(1), positions.unsqueeze(1), torch.zeros_like(positions), attend
            )


def export_step(
    step: StepName,
    model: Any,
    batch_size: int,
    sequence_length: int,
    prompt_length: int | None = None,
) -> torch.export.ExportedProgram:
    """The graph of one step, at a fixed batch size and cache size.

    Only prefill's prompt length is dynamic, from 2 to sequence_length - 1, unless one is given.
    torch.export gives lengths 0 and 1 separate graphs, so prefill starts at 2 and a single token is
    padded. It ends one short of the cache because a prompt that fills it leaves no room for an
    answer.
    """
    config, device = model.config, model.device
    cache = empty_cache(
        layers=config.num_hidden_layers,
        shape=(batch_size, config.num_key_value_heads, sequence_length, head_dim(model)),
        dtype=model.dtype,
        device=device,
    )
    counts = torch.ones(batch_size, dtype=torch.int64, device=device)
    if step == "decode":
        return torch.export.export(Decode(model), (torch.zeros_like(counts), counts, cache))
    ids = torch.zeros(
        batch_size, prompt_length or sequence_length // 2, dtype=torch.int64, device=device
    )
    if prompt_length:
        return torch.export.export(Prefill(model), (ids, counts, cache))
    length = torch.export.Dim("prompt_length", min=2, max=sequence_length - 1)
    dynamic = ({1: length}, None, [None] * len(cache))
    return torch.export.export(Prefill(model), (ids, counts, cache), dynamic_shapes=dynamic)


def head_dim(model: Any) -> int:
    """The size of an attention head, which not every architecture has in its config."""
    return model.model.layers[0].self_attn.head_dim
