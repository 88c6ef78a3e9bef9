"""How large a model is, by its config.json alone: parameters, and the bytes that the stages write of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.model.hub import download_files
from stages.run.errors import InputError
from stages.run.layout import CONFIG_FILE
from stages.run.settings import Settings


def config_values(settings: Settings) -> dict[str, Any]:
    """config.json of MODEL_ID as it lies there, fetched where it is on the Hub; raises InputError where it cannot be had."""
    folder = Path(settings.model_id)
    if not folder.is_dir():
        folder = download_files(settings.model_id, settings.model_revision, (CONFIG_FILE,))
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"MODEL_ID={settings.model_id}: its config.json cannot be read ({error}). Name a model that has one."
        ) from None
    if not isinstance(config, dict):
        raise InputError(
            f"MODEL_ID={settings.model_id}: its config.json is no JSON object. Name another model."
        )
    return config


def parameters(config: dict[str, Any]) -> int | None:
    """Parameters of a decoder of Llama's form (also Qwen3's, Granite's); None where the config does not tell them."""
    try:
        hidden, layers, heads = (
            config["hidden_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
        )
        inner, vocabulary = config["intermediate_size"], config["vocab_size"]
        head = config.get("head_dim") or hidden // heads
        attention = 2 * hidden * head * (heads + (config.get("num_key_value_heads") or heads))
        norms = 2 * hidden + (2 * head if config.get("model_type") == "qwen3" else 0)
        embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
        return layers * (attention + 3 * hidden * inner + norms) + hidden + embeddings
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def bytes_written(settings: Settings, count: int, backend: str) -> dict[str, int]:
    """What the stages write of a model of `count` parameters: bytes by stage, checkpoints apart.

    torch checkpoints hold float32 weights and AdamW's two moments, and a new one is written before the oldest goes;
    Neuron trains bfloat16 and keeps weights alone. Of LoRA only the adapters are written, which is next to nothing.
    """
    half, shards = 2 if settings.bf16 else 4, shard_bytes(settings, count, backend)
    checkpoints = (
        _checkpoint_bytes(settings, count, backend) * (settings.save_total_limit + 1)
        if settings.save_steps
        else 0
    )
    return {
        "checkpoints": checkpoints,
        "train": shards,
        "consolidate": half * count,
        "compile-inference": half * count,
    }


def training_bytes(settings: Settings, backend: str, steps: int) -> int:
    """The most that a training of `steps` steps has on the disk at once, checkpoints and shards together; 0 where that is not known."""
    count = parameters(config_values(settings)) or 0
    checkpoint, limit = _checkpoint_bytes(settings, count, backend), settings.save_total_limit
    written = (
        (steps - 1) // settings.save_steps if settings.save_steps else 0
    )  # none after the last step
    return max(
        min(written, limit + 1) * checkpoint,
        min(written, limit) * checkpoint + shard_bytes(settings, count, backend),
    )


def shard_bytes(settings: Settings, count: int, backend: str) -> int:
    """Bytes of the shards of a model of `count` parameters, as train publishes them."""
    return count * ((0 if settings.lora_r else 2) if backend == "neuron" else 4)


def _checkpoint_bytes(settings: Settings, count: int, backend: str) -> int:
    return shard_bytes(settings, count, backend) * (3 if backend == "torch" else 1)


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in a model's folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
