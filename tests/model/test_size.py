"""A model's size by its config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from stages.model.size import bytes_written, config_values, parameters, training_bytes
from stages.run.errors import InputError
from stages.run.settings import Settings

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
        LlamaConfig(**SMALL, head_dim=32),
        Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=32),
        GraniteConfig(**SMALL, tie_word_embeddings=True),
    ],
    ids=["llama", "llama, tied", "llama, wide heads", "qwen3", "granite, tied"],
)
def test_the_parameters_are_those_that_the_model_has(config: PretrainedConfig) -> None:
    import torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert parameters(json.loads(config.to_json_string(use_diff=False))) == sum(
        tensor.numel() for tensor in model.parameters()
    )


@pytest.mark.parametrize(
    "config",
    [{}, {**SMALL, "hidden_size": None}, {**SMALL, "num_attention_heads": 0}, {"n_embd": 768}],
)
def test_a_config_that_does_not_tell_has_no_number(config: dict[str, object]) -> None:
    assert parameters(config) is None


def test_what_is_written_depends_on_what_is_trained_and_kept() -> None:
    torch = bytes_written(Settings(save_total_limit=1), 10, "torch")
    assert torch == {"checkpoints": 240, "train": 40, "consolidate": 20, "compile-inference": 20}
    assert bytes_written(Settings(save_steps=0, bf16=False), 10, "torch")["checkpoints"] == 0
    assert bytes_written(Settings(lora_r=8), 10, "neuron") == {
        "checkpoints": 0,
        "train": 0,
        "consolidate": 20,
        "compile-inference": 20,
    }


@pytest.mark.parametrize(
    ("backend", "steps", "bytes_each"),
    # torch: shards of 4 bytes a parameter, checkpoints of 12; Neuron: 2 each. Saved every 10 steps but the last, one is kept.
    [
        ("torch", 10, 4),
        ("torch", 11, 12 + 4),
        ("torch", 21, 2 * 12),
        ("torch", 1000, 2 * 12),
        ("neuron", 10, 2),
        ("neuron", 21, 4),
    ],
)
def test_what_lies_there_at_once_depends_on_the_checkpoints_that_are_reached(
    tmp_path: Path, backend: str, steps: int, bytes_each: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    settings = Settings(model_id=str(tmp_path), save_steps=10, save_total_limit=1)
    assert training_bytes(settings, backend, steps) == bytes_each * parameters(SMALL)


def test_of_a_model_that_is_not_known_nothing_is_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert training_bytes(Settings(model_id=str(tmp_path)), "torch", 1000) == 0


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="MODEL_ID"):
        config_values(Settings(model_id=str(tmp_path)))
