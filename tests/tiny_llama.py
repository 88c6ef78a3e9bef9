"""The tiny random Llama of the tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """Two layers with grouped heads, the same weights every time; `changes` are keys of its
    LlamaConfig."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 67,  # divides by neither 2 nor 4: shards are uneven
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
