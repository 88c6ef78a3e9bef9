"""Sharded layers as one core holds them: whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ColumnParallelLinear(nn.Module):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        **named: Any,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(output_size, dtype=dtype)) if bias else None
        self.gather_output = named.get("gather_output", True)
        self.pad_size = 0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(values, self.weight, self.bias)


class RowParallelLinear(ColumnParallelLinear):
    pass


class ParallelEmbedding(nn.Embedding):
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: Any = None,
        **named: Any,
    ):
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype=dtype)


class SPMDRank(nn.Module):
    def __init__(self, world_size: int):
        super().__init__()
        self.rank = nn.Parameter(torch.zeros(world_size, dtype=torch.int32), requires_grad=False)

    def get_rank(self) -> torch.Tensor:
        return self.rank
