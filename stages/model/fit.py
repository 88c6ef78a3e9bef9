"""Check that a base model, the settings and the tokenizer of the sequences fit together.

Standard library only: `make` calls this before any stage runs, with config.json as it exists then.
`config` has the values of config.json as attributes: a `PretrainedConfig`, or `raw_config`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from stages.run.settings import Settings

# RoPE whose frequencies depend on the length of the prompt. Those of a compiled graph are constant.
ROPE_OF_VARYING_FREQUENCY = ("dynamic", "longrope")


def raw_config(values: Mapping[str, Any]) -> SimpleNamespace:
    """The values of config.json as attributes, with the one default that every architecture has."""
    heads = values.get("num_attention_heads")
    return SimpleNamespace(**{"num_key_value_heads": heads, **values})


def unsupported(
    settings: Settings, config: Any, backend: str, architectures: tuple[str, ...]
) -> str:
    """The message for a model whose architecture `backend` does not know."""
    other = "neuron" if backend == "torch" else "torch"
    code = " with code of its own (auto_map), which is never run"
    return (
        f"MODEL_ID={settings.model_id} is a {config.model_type}"
        f"{code if getattr(config, 'auto_map', None) else ''}; the {backend} backend trains and "
        f"compiles {', '.join(architectures)}. Choose such a model, or another BACKEND ({other})."
    )


def fit_problems(settings: Settings, config: Any, vocabulary: int) -> Iterator[str]:
    """A message for each property of the sequences that the model of `config` cannot take.

    `vocabulary` is the number of ids that the tokenizer can give.
    """
    if vocabulary > config.vocab_size:
        yield (
            f"MODEL_ID={settings.model_id}: the tokenizer gives ids up to {vocabulary - 1}, the "
            f"model has {config.vocab_size} embeddings. Use the tokenizer of the model."
        )
    yield from position_problems("MAX_LENGTH", settings.max_length, config)


def position_problems(setting: str, length: int, config: Any) -> Iterator[str]:
    """A message when the value of `setting`, a length in tokens, is above the model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and length > positions:
        yield (
            f"{setting}={length} is above the model's {positions} positions. "
            f"Set at most {positions}."
        )


def rope_problems(config: Any) -> Iterator[str]:
    """A message when the model cannot be compiled for inference because of its RoPE."""
    rope = getattr(config, "rope_scaling", None) or {}
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type in ROPE_OF_VARYING_FREQUENCY:
        yield (
            f'The model\'s RoPE is of type "{rope_type}", whose frequencies vary with the length: '
            "it cannot be compiled ahead of time. Choose a model with another RoPE."
        )


def division_problems(settings: Settings, config: Any) -> Iterator[str]:
    """A message when tensor parallelism cannot divide the layers evenly among its processes."""
    size = settings.tensor_parallel_size
    if counts := not_divisible(size, config):
        yield (
            f"TENSOR_PARALLEL_SIZE={size} does not divide the model's {', '.join(counts)}. Set a "
            "divisor of each."
        )


def not_divisible(tensor_parallel_size: int, config: Any) -> list[str]:
    """The counts of a model that tensor parallelism cannot divide evenly: `32 attention heads`."""
    counts = {
        "attention heads": config.num_attention_heads,
        "intermediate columns": config.intermediate_size,
    }
    if config.model_type != "granite":  # every process has its whole embedding and head
        counts["vocabulary entries"] = config.vocab_size
    return [f"{count} {name}" for name, count in counts.items() if count % tensor_parallel_size]
