"""int8 weights, in torch and in a model that is compiled with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages.backends.torch.compile_inference import compile_model
from stages.backends.torch.export import Decode, Prefill, head_dim
from stages.backends.torch.generate import empty_cache
from stages.backends.torch.int8 import Int8Linear, quantise
from stages.model.fit import ARCHITECTURES
from stages.run.settings import Settings
from tests.tiny_llama import tiny_llama
from tests.tiny_models import tiny_model


@torch.no_grad()
def rounded(model: Any) -> Any:
    """The same model of transformers, each linear weight rounded to 255 steps of its row."""
    weights = [one.weight for one in model.modules() if isinstance(one, torch.nn.Linear)]
    for weight in weights:
        step = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        weight.copy_((weight / step).round() * step)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES["torch"])
@torch.inference_mode()
def test_the_steps_of_a_quantised_model_equal_transformers_with_rounded_weights(
    architecture: str, tied: bool
) -> None:
    expected_model = rounded(tiny_model(architecture, tie_word_embeddings=tied))
    model = quantise(tiny_model(architecture, tie_word_embeddings=tied))
    ids = torch.arange(3, 27).reshape(2, 12) % model.config.vocab_size
    counts = torch.tensor([11, 11])
    shape = (2, model.config.num_key_value_heads, 24, head_dim(model))
    cache = empty_cache(layers=2, shape=shape, dtype=torch.float32, device="cpu")
    prefilled = Prefill(model)(ids[:, :-1], counts, cache)
    decoded = Decode(model)(ids[:, -1], counts, cache)
    expected = expected_model(ids, use_cache=False).logits[:, -2:]
    unquantised = tiny_model(architecture, tie_word_embeddings=tied)(ids).logits[:, -2:]
    both = torch.stack((prefilled, decoded), dim=1)
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-4)
    assert (both - unquantised).abs().max() > 2e-4


def test_a_row_of_zeros_stays_zero_and_no_weight_is_off_by_more_than_half_a_step() -> None:
    linear = torch.nn.Linear(64, 3, bias=False)
    with torch.no_grad():
        linear.weight[1] = 0
    exact, int8 = linear.weight.detach(), Int8Linear(linear)
    off = (int8.weight * int8.scale.unsqueeze(1) - exact).abs()
    assert int8.weight.dtype == torch.int8
    assert not off[1].any()
    assert (off <= exact.abs().amax(1, keepdim=True) / 127 * 0.5001).all()


@pytest.mark.parametrize("tied", [True, False])
def test_a_compiled_model_has_int8_weights_in_its_file_and_gives_the_quantised_models_logits(
    tmp_path: Path, tied: bool
) -> None:
    model = tiny_llama(vocab_size=512, hidden_size=64, tie_word_embeddings=tied)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    facts = {}
    for quantize in ("none", "int8") if tied else ("int8",):
        settings = Settings(
            quantize=quantize, inference_batch_size=2, inference_sequence_length=32, device="cpu"
        )
        folder = tmp_path / quantize
        facts[quantize] = compile_model(tmp_path / "model", folder, settings=settings)
    assert facts["int8"]["quantize"] == "int8"
    weights = load_file(tmp_path / "int8" / "weights.safetensors")
    embeddings = "model.embed_tokens.weight"
    assert (weights[embeddings].dtype == torch.int8) == tied
    matrices = [name for name, one in weights.items() if one.ndim == 2 and name != embeddings]
    assert matrices
    assert {weights[name].dtype for name in matrices} == {torch.int8}
    if tied:
        assert facts["int8"]["weight_bytes"] < 0.6 * facts["none"]["weight_bytes"]
