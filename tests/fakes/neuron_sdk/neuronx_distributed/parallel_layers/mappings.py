"""Exchanges between tensor-parallel ranks, each with its counterpart in the backward pass."""

from __future__ import annotations

from typing import Any

import only_in_name
import torch
import torch.distributed as dist

from neuronx_distributed.parallel_layers import parallel_state


def _sum(value: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
    dist.all_reduce(value, group=group)  # in place: some callers use what they gave
    return value


def _same(value: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
    return value.view_as(value)


def _slice(value: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
    return value.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


def _gather(value: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
    parts = [
        torch.empty_like(value, memory_format=torch.contiguous_format)
        for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts, dim)


def _sum_and_slice(value: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
    return _slice(_sum(value.clone(), group, dim), group, dim)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, ahead: Any, back: Any, group: Any, dim: int
    ) -> torch.Tensor:
        ctx.given = back, group, dim
        return ahead(value, group, dim)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        back, group, dim = ctx.given
        return back(gradient.contiguous().clone(), group, dim), None, None, None, None


def exchange(
    value: torch.Tensor, ahead: Any, back: Any, group: Any = None, dim: int = -1
) -> torch.Tensor:
    group = group if group is not None else parallel_state.get_tensor_model_parallel_group()
    return (
        _Exchange.apply(value, ahead, back, group, dim) if dist.get_world_size(group) > 1 else value
    )


def copy_to_tensor_model_parallel_region(
    value: torch.Tensor, process_group: Any = None
) -> torch.Tensor:
    return exchange(value, _same, _sum, process_group)


def reduce_from_tensor_model_parallel_region(
    value: torch.Tensor, process_group: Any = None
) -> torch.Tensor:
    return exchange(value, _sum, _same, process_group)


def scatter_to_tensor_model_parallel_region(
    value: torch.Tensor, process_group: Any = None
) -> torch.Tensor:
    return exchange(value, _slice, _gather, process_group)


def gather_from_tensor_model_parallel_region(
    value: torch.Tensor, process_group: Any = None
) -> torch.Tensor:
    return exchange(value, _gather, _slice, process_group)


def scatter_to_sequence_parallel_region(
    value: torch.Tensor, sequence_dimension: int = 0, process_group: Any = None
) -> torch.Tensor:
    return exchange(value, _slice, _gather, process_group, sequence_dimension or 0)


def gather_from_sequence_parallel_region(
    value: torch.Tensor,
    sequence_dimension: int = 0,
    to_model_parallel: bool = True,
    process_group: Any = None,
) -> torch.Tensor:
    return exchange(
        value,
        _gather,
        _sum_and_slice if to_model_parallel else _slice,
        process_group,
        sequence_dimension or 0,
    )


def reduce_scatter_to_sequence_parallel_region(
    value: torch.Tensor, sequence_dimension: int = 0, process_group: Any = None
) -> torch.Tensor:
    return exchange(value, _sum_and_slice, _gather, process_group, sequence_dimension or 0)


__getattr__ = only_in_name.placeholder
