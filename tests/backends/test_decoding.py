"""Drawing the next token, against transformers' own filters and against the probabilities."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stages.backends.decoding import sample


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.floats(0.2, 2.0),
    top_k=st.integers(0, 60),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    seed=st.integers(0, 2**31),
)
def test_a_sample_lies_within_what_transformers_leaves_to_draw_from(
    temperature, top_k, top_p, seed
):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed)) * 3
    left = TemperatureLogitsWarper(temperature)(None, logits.clone())
    left = TopKLogitsWarper(top_k)(None, left) if top_k else left
    left = TopPLogitsWarper(top_p)(None, left) if top_p < 1.0 else left
    drawn = sample(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generators=[torch.Generator().manual_seed(seed + slot) for slot in range(4)],
    )
    assert left.gather(1, drawn.unsqueeze(1)).isfinite().all()


def test_samples_are_as_frequent_as_the_probabilities_of_what_is_left():
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probabilities.log().expand(20_000, 4)
    drawn = sample(
        logits,
        temperature=1.0,
        top_k=3,
        top_p=0.75,
        generators=[torch.Generator().manual_seed(0)] * 20_000,
    )
    frequencies = torch.bincount(drawn, minlength=4) / len(drawn)
    # top_k leaves 0.4, 0.3, 0.2; of 0.9 in all, the first two hold 0.78 and the first alone does
    # not hold 0.75.
    torch.testing.assert_close(
        frequencies, torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]), atol=0.02, rtol=0
    )
