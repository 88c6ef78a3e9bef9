"""Which ranks share a layer (tensor parallel: neighbours) and which share its gradients (data
parallel)."""

from __future__ import annotations

from typing import Any

import only_in_name
import torch.distributed as dist
from torch_xla.core.xla_model import group_of

_tensor: list[list[int]] = []
_data: list[list[int]] = []
_kv: list[list[int]] = []


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1, **_: Any
) -> None:
    if pipeline_model_parallel_size != 1:
        raise NotImplementedError("the fakes have no pipeline parallelism")
    world, size = dist.get_world_size(), tensor_model_parallel_size
    _tensor[:] = [list(range(first, first + size)) for first in range(0, world, size)]
    _data[:] = [list(range(first, world, size)) for first in range(size)]
    for groups in (_tensor, _data, [[rank] for rank in range(world)]):
        group_of(groups)  # all ranks make all groups, in one order


def initialize_kv_group(
    kv_shared_group_size: int = 1, sequential_ranks_in_group: bool = False
) -> None:
    """The ranks that hold the same heads of keys and values: in a group of tensor-parallel ranks
    every n-th."""
    step = get_tensor_model_parallel_size() // kv_shared_group_size
    _kv[:] = [ranks[first::step] for ranks in _tensor for first in range(step)]
    group_of(_kv)


def model_parallel_is_initialized() -> bool:
    return bool(_tensor)


def get_tensor_model_parallel_replica_groups() -> list[list[int]]:
    return _tensor


def get_data_parallel_replica_groups() -> list[list[int]]:
    return _data


def get_pipeline_model_parallel_replica_groups() -> list[list[int]]:
    return [[rank] for rank in range(dist.get_world_size())]


def get_tensor_model_parallel_group(as_list: bool = False) -> Any:
    return _tensor if as_list else group_of(_tensor)


def get_data_parallel_group(as_list: bool = False) -> Any:
    return _data if as_list else group_of(_data)


def get_pipeline_model_parallel_group(as_list: bool = False) -> Any:
    groups = get_pipeline_model_parallel_replica_groups()
    return groups if as_list else group_of(groups)


def get_kv_shared_group(as_list: bool = False) -> Any:
    return _kv if as_list else group_of(_kv)


def get_tensor_model_parallel_size() -> int:
    return len(_tensor[0]) if _tensor else 1


def get_tensor_model_parallel_rank() -> int:
    return dist.get_rank() % get_tensor_model_parallel_size()


def get_data_parallel_size() -> int:
    return len(_data[0]) if _data else 1


def get_data_parallel_rank() -> int:
    return dist.get_rank() // get_tensor_model_parallel_size()


def get_pipeline_model_parallel_size() -> int:
    return 1


def get_pipeline_model_parallel_rank() -> int:
    return 0


def get_context_model_parallel_size() -> int:
    return 1


__getattr__ = only_in_name.placeholder
