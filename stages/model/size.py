"""How large a model is: its parameters, and the bytes that the stages write of it."""

from __future__ import annotations

import functools
from pathlib import Path

from stages.run.errors import InputError, StageFailure
from stages.run.settings import Settings


def parameters(settings: Settings) -> int:
    """Parameters of the model that MODEL_ID's config.json describes; tied ones count once.

    Fetches config.json where it is on the Hub. Raises InputError where no model can be made of it.
    """
    return _parameters(settings.model_id, settings.model_revision)


@functools.cache
def _parameters(model: str, revision: str) -> int:
    from stages.model.base import config_folder
    from stages.model.check import described_model

    try:
        described = described_model(config_folder(model, revision))
    except StageFailure as failure:
        raise InputError(f"MODEL_ID={model}: {failure}") from failure
    return sum(parameter.numel() for parameter in described.parameters())


def bytes_written(settings: Settings, count: int, backend: str) -> dict[str, int]:
    """Bytes that each stage writes for a model of `count` parameters; checkpoints are apart.

    torch checkpoints hold float32 weights and AdamW's two moments, and a new one is written before
    the oldest is removed. Neuron trains in bfloat16 and keeps only weights. LoRA writes only the
    adapters, which is next to nothing.
    """
    weights = (2 if settings.bf16 else 4) * count
    checkpoints = 0
    if settings.save_steps:
        checkpoint = _checkpoint_bytes(settings, count, backend)
        checkpoints = checkpoint * (settings.save_total_limit + 1)
    return {
        "checkpoints": checkpoints,
        "train": shard_bytes(settings, count, backend),
        "consolidate": weights,
        "compile-inference": weights,
    }


def training_bytes(settings: Settings, backend: str, steps: int) -> int:
    """The most that a training of `steps` steps has on the disk at once: checkpoints and shards."""
    count = parameters(settings)
    checkpoint, limit = _checkpoint_bytes(settings, count, backend), settings.save_total_limit
    # There is no checkpoint after the last step.
    written = (steps - 1) // settings.save_steps if settings.save_steps else 0
    before_shards = min(written, limit + 1) * checkpoint
    with_shards = min(written, limit) * checkpoint + shard_bytes(settings, count, backend)
    return max(before_shards, with_shards)


def shard_bytes(settings: Settings, count: int, backend: str) -> int:
    """Bytes of the shards that train publishes for a model of `count` parameters."""
    return 0 if settings.lora_r else count * (2 if backend == "neuron" else 4)


def _checkpoint_bytes(settings: Settings, count: int, backend: str) -> int:
    return shard_bytes(settings, count, backend) * (3 if backend == "torch" else 1)


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in a model's folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
