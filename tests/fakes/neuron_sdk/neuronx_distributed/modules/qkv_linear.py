"""The projections of grouped attention where tensor-parallel ranks outnumber the heads of keys and
values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neuronx_distributed.parallel_layers import mappings, parallel_state
from neuronx_distributed.parallel_layers.layers import BaseParallelLinear, spread
from neuronx_distributed.parallel_layers.utils import divide, set_tensor_model_parallel_attributes


class GQAQKVColumnParallelLinear(BaseParallelLinear):
    """Each head of keys and values is on `kv_size_multiplier` ranks, which sum its gradients. Not
    fused, no bias."""

    def __init__(
        self,
        input_size: int,
        output_sizes: list[int],
        bias: bool = True,
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        init_method: Any = None,
        kv_size_multiplier: int = 1,
        fuse_qkv: bool = True,
        **given: Any,
    ):
        if bias or fuse_qkv or gather_output:
            raise NotImplementedError(
                "the fake has no bias, no fused projections and no gathered output"
            )
        super().__init__(input_size, sum(output_sizes), dtype, init_method, given)
        parallel_state.initialize_kv_group(kv_size_multiplier)
        self.output_sizes, self.gather_output, self.fuse_qkv = output_sizes, gather_output, fuse_qkv
        self.kv_size_multiplier, self.use_bias = kv_size_multiplier, bias
        self.q_output_size_per_partition = divide(output_sizes[0], self.ranks)
        self.kv_output_size_per_partition = divide(output_sizes[1] * kv_size_multiplier, self.ranks)
        sizes = {
            "q": self.q_output_size_per_partition,
            "k": self.kv_output_size_per_partition,
            "v": self.kv_output_size_per_partition,
        }
        for name, size in sizes.items():
            weight = nn.Parameter(torch.empty(size, input_size, dtype=dtype))
            nn.init.normal_(weight, std=0.02)
            set_tensor_model_parallel_attributes(weight, True, 0, 1, self.ranks)
            setattr(self, f"weight_{name}", weight)
            setattr(self, f"bias_{name}", None)

    def forward(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value = spread(self, value)
        shared = parallel_state.get_kv_shared_group()
        keys, values = (
            mappings.copy_to_tensor_model_parallel_region(weight, shared)
            for weight in (self.weight_k, self.weight_v)
        )
        return F.linear(value, self.weight_q), F.linear(value, keys), F.linear(value, values)
