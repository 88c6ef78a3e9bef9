"""A model's size by its config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, PretrainedConfig, Qwen3Config

from stages.model.size import bytes_written, parameters, read_config
from stages.run.errors import InputError
from stages.run.settings import Settings

SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 3, "num_attention_heads": 4}


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
    assert parameters(json.loads(config.to_json_string(use_diff=False))) == sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.parametrize("config", [{}, {**SMALL, "hidden_size": None}, {**SMALL, "num_attention_heads": 0}, {"n_embd": 768}])
def test_a_config_that_does_not_tell_has_no_number(config: dict[str, object]) -> None:
    assert parameters(config) is None


def test_what_is_written_depends_on_what_is_trained_and_kept() -> None:
    torch = bytes_written(Settings(save_total_limit=1), 10, "torch")
    assert torch == {"checkpoints": 240, "train": 40, "consolidate": 20, "compile-inference": 20}
    assert bytes_written(Settings(save_steps=0, bf16=False), 10, "torch")["checkpoints"] == 0
    assert bytes_written(Settings(lora_r=8), 10, "neuron") == {"checkpoints": 0, "train": 0, "consolidate": 20, "compile-inference": 20}


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="MODEL_ID"):
        read_config(Settings(model_id=str(tmp_path)))
