"""Weights counted from config.json, held against transformers' own models on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from stages.backends.torch import lora
from stages.forecast.parameters import shape_of, trainable
from stages.model.fit import ARCHITECTURES, LORA_LAYERS, raw_config
from stages.run.settings import Settings
from tests.run.test_recipes import KEYS, MODELS
from tests.tiny_models import PARTICULARS, SIZES


def on_meta(architecture: str, values: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **values))


def counted(model: torch.nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


@pytest.mark.parametrize("architecture", ARCHITECTURES["torch"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tied", [False, True, None], ids=["untied", "tied", "unsaid"])
def test_the_count_is_that_of_the_real_model(
    architecture: str, biases: bool, tied: bool | None
) -> None:
    values = {**SIZES, **PARTICULARS[architecture], "attention_bias": biases, "mlp_bias": biases}
    values.pop("tie_word_embeddings", None)
    if tied is None:
        values.pop("head_dim", None)  # neither it nor the ties: what transformers assumes
    else:
        values["tie_word_embeddings"] = tied
    shape = shape_of(raw_config({"model_type": architecture, **values}))
    assert shape is not None
    assert shape.parameters == counted(on_meta(architecture, values))


@pytest.mark.parametrize("architecture", ARCHITECTURES["torch"])
@pytest.mark.parametrize("layers", [" ".join(LORA_LAYERS), "o_proj"])
def test_loras_weights_are_those_of_its_adapters(architecture: str, layers: str) -> None:
    values = {**SIZES, **PARTICULARS[architecture]}
    run = Settings(lora_r=4, lora_target_modules=layers)
    model = on_meta(architecture, values)
    lora.add_adapters(model, run)
    lora.freeze(model)
    shape = shape_of(raw_config({"model_type": architecture, **values}))
    assert shape is not None
    assert trainable(shape, run) == counted(model, trained=True)
    assert trainable(shape, Settings()) == shape.parameters


@pytest.mark.parametrize("recipe", MODELS)
def test_the_recipes_models_have_the_weights_that_the_hub_shows(
    recipe: str, tmp_path: Path
) -> None:
    values, count = MODELS[recipe]
    shape = shape_of(raw_config(dict(zip(KEYS, values, strict=True))))
    assert shape is not None and shape.parameters == count


def test_llama_2_7b_needs_the_flop_that_the_published_utilisations_count() -> None:
    """43.6 GFLOP a token at 2,048 (6 N with every weight); the embedding is 2% of the weights."""
    shape = shape_of(raw_config(dict(zip(KEYS, MODELS["llama2-7b"][0], strict=True))))
    assert shape is not None
    assert shape.flop_per_token(2048) == pytest.approx(43.6e9, rel=0.025)


def test_a_model_that_no_backend_trains_is_not_counted() -> None:
    assert shape_of(SimpleNamespace(model_type="gpt2", hidden_size=8)) is None
    assert shape_of(SimpleNamespace(model_type="llama", hidden_size=8)) is None
    assert shape_of(SimpleNamespace(**json.loads('{"hidden_size": 8}'))) is None


@pytest.mark.parametrize("size", [0, -8, 10**400, float("inf"), "many", None, [8]])
def test_a_size_that_no_model_has_is_not_counted(size: object) -> None:
    values = {"model_type": "llama", **SIZES, "hidden_size": size}
    assert shape_of(raw_config(values)) is None


@given(st.integers(1, 80), st.integers(1, 64), st.booleans())
@settings(max_examples=50)
def test_a_layer_more_adds_a_layers_weights(layers: int, width: int, tied: bool) -> None:
    values = {**SIZES, "hidden_size": 4 * width, "tie_word_embeddings": tied}
    one, more = (
        shape_of(raw_config({"model_type": "llama", **values, "num_hidden_layers": count}))
        for count in (layers, layers + 1)
    )
    assert one is not None and more is not None
    assert more.parameters - one.parameters == one.layer
    assert more.flop_per_token(64) > one.flop_per_token(64) < one.flop_per_token(128)
