"""The two graphs of generation, as torch.export sees them: prefill reads prompts, decode one token.

Both are Llama's layers from transformers with the attention spelled out, because the keys and
values are in tensors that the caller owns and that the graphs write in place: two per layer, each
[batch, kv heads, sequence length, head dim]. Prompts are padded on the right and every slot has its
own positions, so a batch takes prompts of any lengths: causality hides the padding from the prompt,
and decode overwrites the padding before its mask includes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.nn import functional

from stages.backends.torch.generate import empty_cache

StepName = Literal["prefill", "decode"]
# attend(layer's index, queries, keys, values) -> context; all [batch, heads, new tokens, head dim]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class LlamaStep(torch.nn.Module):
    """The parts of a LlamaForCausalLM under their own names.

    Its parameters and buffers are the constants of a package. Tied embeddings are registered once,
    so that they are one constant and one tensor in the file of weights.
    """

    def __init__(self, llama: Any):
        super().__init__()
        self.model = llama.model
        self.tied = llama.lm_head.weight is llama.model.embed_tokens.weight
        if not self.tied:
            self.lm_head = llama.lm_head

    def hidden_states(
        self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Normalised hidden states [batch, tokens, hidden] of ids [batch, tokens].

        `positions` can be broadcast to the shape of `ids`.
        """
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        hidden = self.model.embed_tokens(ids)
        cos, sin = self.model.rotary_emb(hidden, positions)
        for index, layer in enumerate(self.model.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            queries, keys, values = (
                p(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for p in projections
            )
            queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
            context = attend(index, queries, keys, values)
            hidden = hidden + attention.o_proj(context.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [batch, hidden] -> [batch, vocab]."""
        return (
            functional.linear(hidden, self.model.embed_tokens.weight)
            if self.tied
            else self.lm_head(hidden)
        )


class Prefill(LlamaStep):
    """Reads prompts into an empty cache; computes logits only for each prompt's last token."""

    def forward(
        self, ids: torch.Tensor, lengths: torch.Tensor, cache: list[torch.Tensor]
    ) -> torch.Tensor:
        """ids [batch, longest prompt], padded on the right -> logits [batch, vocab].

        `lengths` [batch] are the prompts' lengths, at least 1 (int64).
        """
        batch, longest = ids.shape

        def attend(
            layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
        ) -> torch.Tensor:
            cache[2 * layer][:, :, :longest] = keys
            cache[2 * layer + 1][:, :, :longest] = values
            # The cache was empty: these are all the keys, so no mask is needed.
            return functional.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, enable_gqa=True
            )

        positions = torch.arange(longest, device=ids.device).unsqueeze(0)
        hidden = self.hidden_states(ids, positions, attend)
        slots = torch.arange(batch, device=ids.device)
        return self.logits(hidden[slots, lengths - 1])


class Decode(LlamaStep):
    """Reads one token per slot, at that slot's position."""

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: list[torch.Tensor]
    ) -> torch.Tensor:
        """ids [batch] -> logits of the next token [batch, vocab].

        `positions` [batch] are below the sequence length (int64).
        """
        batch, kv_heads, sequence_length, head_dim = cache[0].shape
        slots = torch.arange(batch, device=ids.device)
        mask = torch.arange(sequence_length, device=ids.device) <= positions.unsqueeze(1)

        def attend(
            layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
        ) -> torch.Tensor:
            past_keys, past_values = cache[2 * layer], cache[2 * layer + 1]
            past_keys[slots, :, positions] = keys[:, :, 0]
            past_values[slots, :, positions] = values[:, :, 0]
            # The query heads that share a KV head become its queries: grouped attention that does
            # not repeat the cache.
            grouped = queries.reshape(batch, kv_heads, -1, head_dim)
            context = functional.scaled_dot_product_attention(
                grouped, past_keys, past_values, attn_mask=mask[:, None, None]
            )
            return context.reshape(queries.shape)

        hidden = self.hidden_states(ids.unsqueeze(1), positions.unsqueeze(1), attend)
        return self.logits(hidden[:, 0])


def export_step(
    step: StepName, llama: Any, batch_size: int, sequence_length: int
) -> torch.export.ExportedProgram:
    """The graph of one step, at a fixed batch size and cache size.

    Only prefill's prompt length is dynamic, from 2 to sequence_length - 1. torch.export gives
    lengths 0 and 1 separate graphs, so prefill starts at 2 and a single token is padded. It
    ends one short of the cache because a prompt that fills it leaves no room for an answer.
    """
    config, device = llama.config, llama.device
    cache = empty_cache(
        layers=config.num_hidden_layers,
        shape=(
            batch_size,
            config.num_key_value_heads,
            sequence_length,
            llama.model.layers[0].self_attn.head_dim,
        ),
        dtype=llama.dtype,
        device=device,
    )
    counts = torch.ones(batch_size, dtype=torch.int64, device=device)
    if step == "decode":
        return torch.export.export(Decode(llama), (torch.zeros_like(counts), counts, cache))
    ids = torch.zeros(batch_size, sequence_length // 2, dtype=torch.int64, device=device)
    length = torch.export.Dim("prompt_length", min=2, max=sequence_length - 1)
    dynamic = ({1: length}, None, [None] * len(cache))
    return torch.export.export(Prefill(llama), (ids, counts, cache), dynamic_shapes=dynamic)
