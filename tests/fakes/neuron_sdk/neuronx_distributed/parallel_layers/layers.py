"""An embedding split by its vocabulary, and linear layers split by their outputs (column) or inputs
(row).

With sequence parallelism what is between them is split by the sequence, the first dimension then:
[sequence, batch, hidden].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import only_in_name
import torch
import torch.nn.functional as F
from libneuronxla.graphs import traced
from torch import nn

from neuronx_distributed.parallel_layers import mappings, parallel_state
from neuronx_distributed.parallel_layers.utils import (
    EmbeddingUtility,
    divide,
    set_tensor_model_parallel_attributes,
)


def create_local_weight(
    full_weight: torch.Tensor,
    partition_dim: int,
    per_partition_size: int,
    stride: int,
    out_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """This rank's part of a weight; with a stride, of each of `stride` matrices that lie one after
    the other."""
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_size(),
    )
    pieces = torch.split(full_weight, divide(per_partition_size, stride), dim=partition_dim)
    with torch.no_grad():
        return torch.cat(pieces[rank::size], dim=partition_dim, out=out_weight)


class BaseParallelLinear(nn.Module):
    partition_dim: int

    def __init__(
        self,
        input_size: int,
        output_size: int,
        dtype: torch.dtype,
        init_method: Callable | None,
        given: dict[str, Any],
    ):
        super().__init__()
        self.input_size, self.output_size, self.dtype, self.arg_init_method = (
            input_size,
            output_size,
            dtype,
            init_method,
        )
        self.tensor_parallel_group = (
            given.get("tensor_model_parallel_group")
            or parallel_state.get_tensor_model_parallel_group()
        )
        self.sequence_parallel_enabled = given.get("sequence_parallel_enabled", False)
        self.sequence_dimension = given.get("sequence_dimension")
        self.stride, self.device, self.reduce_dtype = (
            given.get("stride", 1),
            torch.device("cpu"),
            given.get("reduce_dtype", dtype),
        )
        self.keep_master_weight = self.skip_bias_add = self.pad = False
        self.ranks = self.tensor_parallel_group.size()

    def make_weight(self, *shape: int) -> None:
        self.weight = nn.Parameter(torch.empty(*shape, dtype=self.dtype))
        set_tensor_model_parallel_attributes(
            self.weight, True, self.partition_dim, self.stride, self.ranks
        )
        self.initialize_weight_and_bias()

    def initialize_weight_and_bias(self) -> None:
        """The part of one matrix that all ranks make alike, whatever their number."""
        shape = list(self.weight.shape)
        shape[self.partition_dim] *= self.ranks
        whole = torch.empty(shape)
        self.arg_init_method(whole) if self.arg_init_method else nn.init.kaiming_uniform_(
            whole, a=math.sqrt(5)
        )
        local = create_local_weight(
            whole, self.partition_dim, self.weight.shape[self.partition_dim], self.stride
        )
        with torch.no_grad():
            self.weight.copy_(local)
            if self.bias is not None:
                self.bias.zero_()


class ColumnParallelLinear(BaseParallelLinear):
    partition_dim = 0

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        init_method: Callable | None = None,
        **given: Any,
    ):
        super().__init__(input_size, output_size, dtype, init_method, given)
        self.gather_output = gather_output
        self.output_size_per_partition = divide(output_size, self.ranks)
        self.bias = (
            nn.Parameter(torch.zeros(self.output_size_per_partition, dtype=dtype)) if bias else None
        )
        if bias:
            set_tensor_model_parallel_attributes(self.bias, True, 0, self.stride, self.ranks)
        self.make_weight(self.output_size_per_partition, input_size)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        output = F.linear(spread(self, value), self.weight, self.bias)
        return (
            mappings.gather_from_tensor_model_parallel_region(output, self.tensor_parallel_group)
            if self.gather_output
            else output
        )


def spread(layer: Any, value: torch.Tensor) -> torch.Tensor:
    """The whole input of a column-parallel layer on each rank; the ranks' gradients of it are
    summed."""
    if layer.sequence_parallel_enabled:
        return mappings.gather_from_sequence_parallel_region(
            value, process_group=layer.tensor_parallel_group
        )
    return mappings.copy_to_tensor_model_parallel_region(value, layer.tensor_parallel_group)


class RowParallelLinear(BaseParallelLinear):
    partition_dim = 1

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        init_method: Callable | None = None,
        **given: Any,
    ):
        super().__init__(input_size, output_size, dtype, init_method, given)
        self.input_is_parallel = input_is_parallel
        self.input_size_per_partition = divide(input_size, self.ranks)
        self.bias = nn.Parameter(torch.zeros(output_size, dtype=dtype)) if bias else None
        self.make_weight(output_size, self.input_size_per_partition)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if not self.input_is_parallel:
            value = mappings.scatter_to_tensor_model_parallel_region(
                value, self.tensor_parallel_group
            )
        output = F.linear(value, self.weight)
        gather = self.sequence_parallel_enabled
        collect = (
            mappings.reduce_scatter_to_sequence_parallel_region
            if gather
            else mappings.reduce_from_tensor_model_parallel_region
        )
        output = collect(output, process_group=self.tensor_parallel_group)
        return output if self.bias is None else output + self.bias


class ParallelEmbedding(nn.Module):
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        init_method: Callable = nn.init.normal_,
        dtype: torch.dtype = torch.float32,
        sequence_parallel_enabled: bool = False,
        tensor_model_parallel_group: Any = None,
        **given: Any,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx, self.dtype = (
            num_embeddings,
            embedding_dim,
            None,
            dtype,
        )
        self.tensor_model_parallel_group = (
            tensor_model_parallel_group or parallel_state.get_tensor_model_parallel_group()
        )
        self.sequence_parallel_enabled, self.stride = sequence_parallel_enabled, 1
        ranks = self.tensor_model_parallel_group.size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        self.start_index, self.end_index = EmbeddingUtility.range_from_global_vocab_size(
            num_embeddings, rank, ranks
        )
        self.num_embeddings_per_partition = self.end_index - self.start_index
        whole = torch.empty(num_embeddings, embedding_dim)
        init_method(whole)
        self.weight = nn.Parameter(whole[self.start_index : self.end_index].to(dtype).clone())
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1, ranks)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        traced(
            f"ids {ids.dtype} {list(ids.shape)} sequence parallel {self.sequence_parallel_enabled}"
        )
        here = (ids >= self.start_index) & (ids < self.end_index)
        output = F.embedding((ids - self.start_index) * here, self.weight) * here.unsqueeze(-1).to(
            self.weight.dtype
        )
        if self.sequence_parallel_enabled:
            output = output.transpose(0, 1).contiguous()
            return mappings.reduce_scatter_to_sequence_parallel_region(
                output, process_group=self.tensor_model_parallel_group
            )
        return mappings.reduce_from_tensor_model_parallel_region(
            output, self.tensor_model_parallel_group
        )


__getattr__ = only_in_name.placeholder
