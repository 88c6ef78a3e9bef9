"""int8 weights: each row of a linear layer's weight as int8 numbers and one float32 scale.

Symmetric, so a weight is number * scale and there is no zero point. Embeddings that are also the
head are quantised with it: a row of theirs is one of the head's. Other embeddings are not, because
a token reads one row of them; nor are norms and biases.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

LARGEST = 127


class Int8Linear(torch.nn.Module):
    """A linear layer with an int8 weight [outputs, inputs] and scales [outputs]."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        _register(self, linear.weight)
        self.bias = linear.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return int8_linear(hidden, self.weight, self.bias, self.scale)


class Int8Embedding(torch.nn.Module):
    """Embeddings [vocabulary, hidden] with a scale for each id, which may be a head too."""

    weight: torch.Tensor
    scale: torch.Tensor
    embed_scale: torch.Tensor | None

    def __init__(self, embedding: torch.nn.Embedding):
        super().__init__()
        _register(self, embedding.weight)
        self.dtype = embedding.weight.dtype
        # By which Gemma's embeddings multiply what they return.
        self.register_buffer("embed_scale", getattr(embedding, "embed_scale", None), False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedded = dequantised(self.weight[ids], self.scale[ids], self.dtype)
        if self.embed_scale is None:
            return embedded
        return embedded * self.embed_scale.to(self.dtype)


class TiedHead(torch.nn.Module):
    """A head whose weight, and scales, have no names of their own: they are the embeddings'."""

    def __init__(self, embedding: torch.nn.Embedding | Int8Embedding):
        super().__init__()
        self._embedding = [embedding]  # in a list, so that it is no part of this module

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        [embedding] = self._embedding
        if isinstance(embedding, Int8Embedding):
            return int8_linear(hidden, embedding.weight, None, embedding.scale)
        return functional.linear(hidden, embedding.weight)


def quantise(model: Any) -> Any:
    """Replace the linear layers of a causal language model of transformers by int8 ones."""
    if model.config.tie_word_embeddings:
        model.model.embed_tokens = Int8Embedding(model.model.embed_tokens)
        model.lm_head = TiedHead(model.model.embed_tokens)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.set_submodule(name, Int8Linear(module))
    return model


def int8_linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
) -> torch.Tensor:
    """`functional.linear` with the weight that `weight` and `scale` are.

    Modes see it, as they see torch's functions: export.py computes it in another way.
    """
    operands = hidden, weight, scale
    if has_torch_function(operands):
        return handle_torch_function(int8_linear, operands, hidden, weight, bias, scale)
    return functional.linear(hidden, dequantised(weight, scale, hidden.dtype), bias)


def dequantised(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight as `dtype`, rounded once."""
    return (weight * scale.unsqueeze(-1)).to(dtype)


@torch.no_grad()
def _register(module: torch.nn.Module, weight: torch.Tensor) -> None:
    """Give `module` the int8 rows of `weight` and their scales.

    They are buffers: transformers takes a model's dtype from its first parameter.
    """
    exact = weight.float()
    # A row of zeros has any scale but 0, by which it is divided.
    scale = (exact.abs().amax(-1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    module.register_buffer("weight", (exact / scale.unsqueeze(-1)).round().to(torch.int8))
    module.register_buffer("scale", scale)
