"""Small things that the layers and optimum-neuron's models share."""

from __future__ import annotations

import os
from typing import Any

import only_in_name
import torch


def divide(numerator: int, denominator: int) -> int:
    if numerator % denominator:
        raise AssertionError(f"{numerator} is not divisible by {denominator}")
    return numerator // denominator


def get_local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def set_tensor_model_parallel_attributes(
    tensor: torch.Tensor, is_parallel: bool, dim: int, stride: int, num_partitions: int
) -> None:
    tensor.tensor_model_parallel, tensor.partition_dim = is_parallel, dim
    tensor.partition_stride, tensor.num_partitions = stride, num_partitions


def move_model_to_device(model: torch.nn.Module, device: torch.device) -> None:
    model.to(device)


def move_all_tensor_to_cpu(data: Any, convert: bool = True) -> Any:
    if isinstance(data, dict):
        return type(data)(
            (key, move_all_tensor_to_cpu(value, convert)) for key, value in data.items()
        )
    return data.cpu() if isinstance(data, torch.Tensor) and convert else data


class EmbeddingUtility:
    """The rows of a vocabulary that a rank holds: [first, after the last)."""

    @staticmethod
    def range_from_per_partition_vocab_size(
        per_partition_vocab_size: int, rank: int, world_size: int
    ) -> tuple[int, int]:
        return rank * per_partition_vocab_size, (rank + 1) * per_partition_vocab_size

    @staticmethod
    def range_from_global_vocab_size(
        global_vocab_size: int, rank: int, world_size: int
    ) -> tuple[int, int]:
        return EmbeddingUtility.range_from_per_partition_vocab_size(
            divide(global_vocab_size, world_size), rank, world_size
        )


__getattr__ = only_in_name.placeholder
