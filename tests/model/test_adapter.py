"""Adapters that are damaged, or of another kind or model: refused by a StageFailure or merged, with
any content. What a sound one gives is tested with the trainings of both backends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.model.adapter import merged_tensors
from stages.model.weights import write_safetensors
from stages.run.errors import StageFailure
from tests.tiny_models import tiny_model

LAYER = "model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
ADAPTER = {
    f"model.layers.{layer}.self_attn.q_proj.lora_{half}.weight": torch.ones(shape)
    for layer in range(2)
    for half, shape in (("A", (2, 32)), ("B", (32, 2)))
}
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
same_folder = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    return folder


def merge(base: Path, folder: Path, config: Any, adapter: dict[str, torch.Tensor]) -> None:
    """Merge and write; only a StageFailure may come out of it."""
    shards, output = folder / "shards", folder / "output"
    shards.mkdir(exist_ok=True)
    output.mkdir(exist_ok=True)
    (shards / "adapter_config.json").write_text(
        config if isinstance(config, str) else json.dumps(config)
    )
    sources, _ = merged_tensors(adapter, shards, base, "float32", {})
    write_safetensors(sources, output, max_shard_size=2**30)


def test_a_sound_adapter_is_merged(base: Path, tmp_path: Path) -> None:
    merge(base, tmp_path, CONFIG, ADAPTER)


@same_folder
@given(key=st.sampled_from([*CONFIG, "bias", "use_dora", "use_rslora"]), value=any_json)
def test_any_value_in_the_adapters_config_is_used_or_refused(
    base: Path, tmp_path: Path, key: str, value: Any
) -> None:
    try:
        merge(base, tmp_path, {**CONFIG, key: value}, ADAPTER)
    except StageFailure:
        return
    if key in ("r", "lora_alpha"):
        assert math.isfinite(value)


@same_folder
@given(text=any_json.map(json.dumps) | st.text())
def test_any_text_for_the_adapters_config_is_refused(base: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(StageFailure, match=r"adapter_config\.json"):
        merge(base, tmp_path, text, ADAPTER)


@same_folder
@given(
    name=st.sampled_from([*ADAPTER, f"{LAYER}.weight", f"{LAYER}.lora_C.weight", "lora_A", ""]),
    shape=st.lists(st.integers(0, 40), max_size=3),
)
def test_a_tensor_of_another_name_or_shape_is_refused(
    base: Path, tmp_path: Path, name: str, shape: list[int]
) -> None:
    tensor = torch.ones(shape)
    if name in ADAPTER and tensor.shape == ADAPTER[name].shape:
        return
    with pytest.raises(StageFailure, match="cannot be merged"):
        merge(base, tmp_path, CONFIG, {**ADAPTER, name: tensor})


def test_an_adapter_that_lacks_a_layer_is_refused(base: Path, tmp_path: Path) -> None:
    for name in ADAPTER:
        fewer = {key: value for key, value in ADAPTER.items() if key != name}
        with pytest.raises(StageFailure, match=r"lora_[AB] is missing"):
            merge(base, tmp_path, CONFIG, fewer)
    with pytest.raises(StageFailure, match="the shards hold nothing for it"):
        merge(base, tmp_path, CONFIG, {})
