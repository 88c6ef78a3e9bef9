"""The weights of a model, counted from its config.json alone. Standard library only.

The count is that of transformers' own models for every architecture that the backends train
(`stages.model.fit.ARCHITECTURES`); tied embeddings count once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from stages.model.fit import ARCHITECTURES
from stages.run.settings import Settings

# What transformers assumes of an architecture where config.json does not say.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"tie_word_embeddings": True, "head_dim": 256},
    "qwen3": {"head_dim": 128},
    "smollm3": {"tie_word_embeddings": True},
}
_MOST = 2**32  # a config.json of anybody: no size of a model is that large
# Whether attention_bias and mlp_bias mean anything, by architecture.
_ATTENTION_BIAS = ("gemma3_text", "granite", "llama", "olmo2", "qwen3", "smollm3")
_MLP_BIAS = ("granite", "llama", "smollm3")


@dataclass(frozen=True)
class Matrix:
    """A linear layer: `inputs` x `outputs` weights, and `outputs` biases where it has them."""

    name: str
    inputs: int
    outputs: int
    bias: bool

    @property
    def parameters(self) -> int:
        return self.outputs * (self.inputs + self.bias)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, in the words of config.json; `norms` are a layer's norm weights.
    `config`: the values of config.json, for the checks of the backends."""

    kind: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    matrices: tuple[Matrix, ...]
    norms: int
    config: SimpleNamespace = field(repr=False, compare=False)

    @property
    def embedding(self) -> int:
        """Weights of the input embedding, which the output shares where they are tied."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        return sum(matrix.parameters for matrix in self.matrices) + self.norms

    @property
    def parameters(self) -> int:
        """Weights in all."""
        return self.layers * self.layer + self.embedding * (1 if self.tied else 2) + self.hidden

    def flop_per_token(self, length: int, trains_all: bool = True) -> float:
        """Floating-point operations of training on one token: 6 N + 12 L d s.

        N leaves out the input embedding, which is looked up, not multiplied; d is heads x head
        size, s the length (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). Attention counts
        whole sequences, as the published MFU do. LoRA computes no gradient of frozen weights: 4 N.
        """
        multiplied = self.layers * self.layer + self.embedding
        attention = 12 * self.layers * self.heads * self.head_size * length
        return (6 if trains_all else 4) * multiplied + attention


def shape_of(config: SimpleNamespace) -> Shape | None:
    """The shape of the model of `config` (`stages.model.fit.raw_config`); None where it is of an
    architecture that no backend trains, or lacks a size."""
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES["torch"]:
        return None
    values = {**_DEFAULTS.get(kind, {}), **vars(config)}
    try:
        hidden, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
        key_value = int(values.get("num_key_value_heads") or heads)
        head_size = int(values.get("head_dim") or hidden // heads)
        sizes = (hidden, int(values["intermediate_size"]), heads, key_value, head_size)
        layers, vocabulary = int(values["num_hidden_layers"]), int(values["vocab_size"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    if not all(0 < size < _MOST for size in (*sizes, layers, vocabulary)):
        return None  # what a stage refuses when it reads the model
    return Shape(
        *(kind, layers, *sizes, vocabulary),
        tied=bool(values.get("tie_word_embeddings", False)),
        matrices=_matrices(kind, values, *sizes),
        norms=_norms(kind, hidden, heads * head_size, key_value * head_size, head_size),
        config=config,
    )


def _matrices(
    kind: str,
    values: dict[str, Any],
    hidden: int,
    intermediate: int,
    heads: int,
    key_value: int,
    head_size: int,
) -> tuple[Matrix, ...]:
    """The linear layers of one layer."""
    queries, keys = heads * head_size, key_value * head_size
    bias = kind in _ATTENTION_BIAS and bool(values.get("attention_bias"))
    mlp = kind in _MLP_BIAS and bool(values.get("mlp_bias"))
    if kind == "phi3":  # joined
        return (
            Matrix("qkv_proj", hidden, queries + 2 * keys, False),
            Matrix("o_proj", queries, hidden, False),
            Matrix("gate_up_proj", hidden, 2 * intermediate, False),
            Matrix("down_proj", intermediate, hidden, False),
        )
    inward = bias or kind == "qwen2"
    return (
        Matrix("q_proj", hidden, queries, inward),
        Matrix("k_proj", hidden, keys, inward),
        Matrix("v_proj", hidden, keys, inward),
        Matrix("o_proj", queries, hidden, bias),
        Matrix("gate_proj", hidden, intermediate, mlp),
        Matrix("up_proj", hidden, intermediate, mlp),
        Matrix("down_proj", intermediate, hidden, mlp),
    )


def _norms(kind: str, hidden: int, queries: int, keys: int, head_size: int) -> int:
    """The norm weights of one layer."""
    if kind == "olmo2":  # after the attention and the MLP, and over all heads
        return 2 * hidden + queries + keys
    of_heads = 2 * head_size if kind in ("qwen3", "gemma3_text") else 0
    return (4 if kind == "gemma3_text" else 2) * hidden + of_heads


def trainable(shape: Shape, settings: Settings) -> int:
    """The weights that are trained: all, or those of LoRA's adapters."""
    if not settings.lora_r:
        return shape.parameters
    targets = settings.lora_target_modules.split()
    adapters = sum(
        settings.lora_r * (matrix.inputs + matrix.outputs)
        for matrix in shape.matrices
        if matrix.name in targets
    )
    return shape.layers * adapters
