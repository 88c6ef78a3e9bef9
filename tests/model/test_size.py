"""A model's size by only its config.json."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GraniteConfig, LlamaConfig, PretrainedConfig, Qwen3Config

from stages.model.size import bytes_written, parameters, training_bytes
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
    ("config", "count"),
    [
        # embeddings and head, then per layer attention, MLP and norms, then the last norm
        (LlamaConfig(**SMALL), 2 * 96 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 144 + 2 * 64) + 64),
        (
            LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
            96 * 64 + 3 * (3 * 64 * 64 + 3 * 64 * 144 + 2 * 64) + 64,
        ),
        (
            Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=32),
            2 * 96 * 64 + 3 * (2 * 64 * 32 * (4 + 2) + 3 * 64 * 144 + 2 * 64 + 2 * 32) + 64,
        ),
        (
            GraniteConfig(**SMALL, tie_word_embeddings=True),
            96 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 144 + 2 * 64) + 64,
        ),
    ],
    ids=["llama", "llama, tied", "qwen3", "granite, tied"],
)
def test_a_models_parameters_are_counted_without_its_weights(
    tmp_path: Path, config: PretrainedConfig, count: int
) -> None:
    config.save_pretrained(tmp_path)
    assert parameters(Settings(model_id=str(tmp_path))) == count


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
    # torch: shards of 4 bytes a parameter, checkpoints of 12; Neuron: 2 each. Saved every 10 steps
    # but the last, one is kept.
    [
        ("torch", 10, 4),
        ("torch", 11, 12 + 4),
        ("torch", 21, 2 * 12),
        ("torch", 1000, 2 * 12),
        ("neuron", 10, 2),
        ("neuron", 21, 4),
    ],
)
def test_the_disk_needed_depends_on_the_checkpoints_that_a_training_reaches(
    tmp_path: Path, backend: str, steps: int, bytes_each: int
) -> None:
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    settings = Settings(model_id=str(tmp_path), save_steps=10, save_total_limit=1)
    assert training_bytes(settings, backend, steps) == bytes_each * parameters(settings)


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", "\x00", '{"model_type": "gpt9"}'])
def test_a_config_that_describes_no_model_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="MODEL_ID"):
        training_bytes(Settings(model_id=str(tmp_path)), "torch", 1000)
