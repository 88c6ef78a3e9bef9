"""Check that a base model, the settings and the tokenizer of the sequences fit together.

Standard library only: `make` calls this before any stage runs, with config.json as it exists then.
`config` has the values of config.json as attributes: a `PretrainedConfig`, or `raw_config`'s.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from stages.run.backend import choose
from stages.run.settings import Settings

# The architectures (`model_type` in config.json) that each backend trains and compiles. On Neuron
# they are those that optimum-neuron has for both.
ARCHITECTURES = {
    "neuron": ("granite", "llama", "qwen3"),
    "torch": (
        *("gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"),
        "smollm3",
    ),
}
# The linear layers of an architecture that LoRA can adapt, where they are not joined to others.
LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# RoPE whose frequencies depend on the length of the prompt. Those of a compiled graph are constant.
ROPE_OF_VARYING_FREQUENCY = ("dynamic", "longrope")


def raw_config(values: Mapping[str, Any]) -> SimpleNamespace:
    """The values of config.json as attributes, with the one default that every architecture has."""
    heads = values.get("num_attention_heads")
    return SimpleNamespace(**{"num_key_value_heads": heads, **values})


def architecture_problems(settings: Settings, config: Any, backend: str) -> Iterator[str]:
    """A message when `backend` does not know the architecture of the model, or a part of it."""
    kind = config.model_type
    if kind not in ARCHITECTURES[backend]:
        code = ", with code of its own (auto_map), which is never run"
        lists = "; ".join(f"{name}: {', '.join(types)}" for name, types in ARCHITECTURES.items())
        every = sorted({name for types in ARCHITECTURES.values() for name in types})
        nearest = "".join(
            f" The nearest to it is {name} (BACKEND="
            f"{' or '.join(key for key, types in ARCHITECTURES.items() if name in types)})."
            for name in difflib.get_close_matches(str(kind), every, n=1)
        )
        yield (
            f"MODEL_ID={settings.model_id} is a {kind}"
            f"{code if getattr(config, 'auto_map', None) else ''}, which the {backend} backend "
            f"does not train or compile. The backends know {lists}.{nearest}"
        )
    elif cap := getattr(config, "attn_logit_softcapping", None):
        yield (
            f"MODEL_ID={settings.model_id}: attn_logit_softcapping={cap} in config.json is not "
            "supported. Choose another model."
        )


def window_problems(setting: str, length: int, config: Any) -> Iterator[str]:
    """A message when sequences of `length` tokens reach beyond the model's sliding window.

    For a backend that lets every token see all before it.
    """
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)  # Qwen names a window that it does not use
    if window and used and length > window:
        yield (
            f"{setting}={length} is above the model's sliding window of {window} tokens, which "
            f"this backend does not have. Set at most {window}."
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


def quantize_problems(settings: Settings) -> Iterator[str]:
    """A message when QUANTIZE asks for what only inductor compiles."""
    chosen = choose(settings)
    if settings.quantize != "none" and (chosen.name == "neuron" or chosen.on_neuron):
        yield (
            f"QUANTIZE={settings.quantize} is for a CPU or a GPU, and this model would be compiled "
            "for Neuron. Set QUANTIZE=none."
        )


def lora_layer_problems(settings: Settings, layers: tuple[str, ...]) -> Iterator[str]:
    """A message when LORA_TARGET_MODULES names none of the model's linear `layers`, or others."""
    names = settings.lora_target_modules.split()
    unknown = [name for name in names if name not in layers]
    if unknown or not names:
        problem = f"names {', '.join(unknown)}" if unknown else "names no layer"
        yield f"LORA_TARGET_MODULES {problem}. Set it to some of {', '.join(layers)}."


def not_divisible(tensor_parallel_size: int, config: Any) -> list[str]:
    """The counts of a layer that tensor parallelism cannot divide evenly: `32 attention heads`."""
    counts = {
        "attention heads": config.num_attention_heads,
        "intermediate columns": config.intermediate_size,
    }
    return [f"{count} {name}" for name, count in counts.items() if count % tensor_parallel_size]
