"""A tiny random model of each architecture that the torch backend trains."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.model.fit import ARCHITECTURES

SIZES = {
    "vocab_size": 67,  # divides by neither 2 nor 4: the parts of tensor parallelism are uneven
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Wide enough that greedy answers are not one id repeated.
    "initializer_range": 0.2,
}
# What each architecture has that the others have not, or have in another way.
PARTICULARS: dict[str, dict[str, Any]] = {
    "llama": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {"sliding_window": 8, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 8},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    "granite": {
        "tie_word_embeddings": True,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "smollm3": {"tie_word_embeddings": True, "no_rope_layer_interval": 2},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"sliding_window": 8},
    "olmo2": {},
}
# The first layer of a Qwen 2 has no window unless this is said.
PARTICULARS["qwen2"]["max_window_layers"] = 1
assert PARTICULARS.keys() == set(ARCHITECTURES["torch"])


def tiny_model(architecture: str, **changes: Any) -> Any:
    """Its weights, in float32, are the same every time; `changes` are keys of its config."""
    values = {"tie_word_embeddings": False, **SIZES, **PARTICULARS[architecture], **changes}
    config = AutoConfig.for_model(architecture, **values)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
