"""The exported steps of every architecture, uncompiled, against transformers' own model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from stages.backends.device import DEVICES
from stages.backends.torch import export
from stages.backends.torch.export import FEW_SLOTS, Decode, Prefill, _product_and_sum, head_dim
from stages.backends.torch.generate import CompiledModel, empty_cache
from stages.model.fit import ARCHITECTURES
from stages.run.settings import Settings
from tests.tiny_models import tiny_model

TOKENS = ("bos", "eos", "pad")


def test_tied_embeddings_are_one_constant_and_untied_ones_two() -> None:
    tied, untied = (
        dict(Decode(tiny_model("llama", tie_word_embeddings=tie)).named_parameters())
        for tie in (True, False)
    )
    assert untied.keys() - tied.keys() == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        *((architecture, {}) for architecture in ARCHITECTURES["torch"]),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "mlp_bias": False}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "as usual",
)
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=st.integers(0, 2**31))
@torch.inference_mode()
def test_prefill_then_decode_of_a_ragged_batch_equals_each_row_read_whole_and_alone(
    architecture: str, changes: dict[str, Any], lengths: list[int], seed: int
) -> None:
    model, exported = (tiny_model(architecture, **changes) for _ in range(2))
    ids = torch.randint(
        model.config.vocab_size,
        (len(lengths), max(lengths) + 1),
        generator=torch.Generator().manual_seed(seed),
    )
    counts = torch.tensor(lengths)
    shape = (len(lengths), model.config.num_key_value_heads, 24, head_dim(model))
    cache = empty_cache(layers=2, shape=shape, dtype=torch.float32, device="cpu")
    prefilled = Prefill(exported)(ids[:, :-1], counts, cache)
    decoded = Decode(exported)(ids[torch.arange(len(lengths)), counts], counts, cache)
    for row, length in enumerate(lengths):
        expected = model(ids[row : row + 1, : length + 1], use_cache=False).logits[0, -2:]
        torch.testing.assert_close(
            torch.stack((prefilled[row], decoded[row])), expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("slots", range(1, FEW_SLOTS + 1))
@torch.inference_mode()
def test_a_product_and_sum_is_a_linear_layer(slots: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(slots)
    hidden = torch.randn(slots, 1, 96, generator=generator).to(dtype)
    weight = torch.randn(40, 96, generator=generator).to(dtype)
    for bias in (None, torch.randn(40, generator=generator).to(dtype)):
        expected = functional.linear(
            hidden.double(), weight.double(), None if bias is None else bias.double()
        )
        result = _product_and_sum(hidden, weight, bias)
        assert result.dtype == dtype
        # As near to the exact result as the dtype can be: only the result is rounded to it.
        torch.testing.assert_close(
            result.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5
        )


@pytest.mark.parametrize(("slots", "few"), [(1, True), (FEW_SLOTS, True), (FEW_SLOTS + 1, False)])
@torch.inference_mode()
def test_every_linear_layer_of_a_decode_of_few_slots_is_a_product_and_sum(
    slots: int, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[torch.Size] = []

    def counted(hidden: torch.Tensor, weight: torch.Tensor, *bias: Any) -> torch.Tensor:
        shapes.append(weight.shape)
        return _product_and_sum(hidden, weight, *bias)

    monkeypatch.setattr(export, "_product_and_sum", counted)
    model = tiny_model("llama", tie_word_embeddings=True)
    cache = empty_cache(layers=2, shape=(slots, 2, 24, 8), dtype=torch.float32, device="cpu")
    ids, one = torch.arange(slots), torch.ones(slots, dtype=torch.int64)
    decoded = Decode(model)(ids, one, cache)
    # Seven in each of two layers, and the tied head.
    assert len(shapes) == (15 if few else 0)
    monkeypatch.setattr(export, "FEW_SLOTS", 0)
    torch.testing.assert_close(decoded, Decode(model)(ids, one, cache), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES["torch"])
@torch.inference_mode()
def test_greedy_answers_to_20_prompts_are_those_of_transformers_token_for_token(
    architecture: str,
) -> None:
    model, exported = tiny_model(architecture), tiny_model(architecture)
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(3, 67, (length,), generator=generator).tolist() for length in range(1, 21)
    ]
    config = model.config
    steps = CompiledModel(
        {
            "batch_size": len(prompts),
            "sequence_length": 48,
            "vocab_size": config.vocab_size,
            **{f"{name}_token_id": getattr(config, f"{name}_token_id") for name in TOKENS},
            "dtype": "float32",
            "layers": config.num_hidden_layers,
            "cache_shape": (len(prompts), config.num_key_value_heads, 48, head_dim(model)),
        },
        DEVICES["cpu"](Settings()),
        {},
        Prefill(exported),
        Decode(exported),
        range(2, 48),
    ).generate(
        prompts,
        max_new_tokens=24,
        do_sample=False,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        eos_token_id=2,
    )
    answers = [[new for new in answer if new is not None] for answer in zip(*steps, strict=True)]
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
        expected = whole[0, len(prompt) :].tolist()
        assert answer == (expected[: expected.index(2)] if 2 in expected else expected)
