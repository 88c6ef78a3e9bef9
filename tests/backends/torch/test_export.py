"""The exported step of a Llama against transformers' own, uncompiled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.backends.torch.export import Decode, LlamaStep, Prefill
from stages.backends.torch.generate import empty_cache
from tests.tiny_llama import tiny_llama


def test_tied_embeddings_are_one_constant_and_untied_ones_two():
    tied, untied = (
        dict(LlamaStep(tiny_llama(tie_word_embeddings=tie)).named_parameters())
        for tie in (True, False)
    )
    assert untied.keys() - tied.keys() == {"lm_head.weight"}


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
        {"head_dim": 32},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    ids=",".join,
)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=st.integers(0, 2**31))
@torch.inference_mode()
def test_prefill_then_decode_of_a_ragged_batch_equals_each_row_read_whole_and_alone(
    changes, lengths, seed
):
    llama = tiny_llama(**{"tie_word_embeddings": True, "initializer_range": 0.2, **changes})
    ids = torch.randint(
        llama.config.vocab_size,
        (len(lengths), max(lengths) + 1),
        generator=torch.Generator().manual_seed(seed),
    )
    counts = torch.tensor(lengths)
    shape = (len(lengths), llama.config.num_key_value_heads, 24, llama.config.head_dim)
    cache = empty_cache(layers=2, shape=shape, dtype=torch.float32, device="cpu")
    prefilled = Prefill(llama)(ids[:, :-1], counts, cache)
    decoded = Decode(llama)(ids[torch.arange(len(lengths)), counts], counts, cache)
    for row, length in enumerate(lengths):
        expected = llama(ids[row : row + 1, : length + 1], use_cache=False).logits[0, -2:]
        torch.testing.assert_close(
            torch.stack((prefilled[row], decoded[row])), expected, rtol=1e-4, atol=1e-4
        )
