"""The device, step closures and collectives of torch_xla.core.xla_model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from libneuronxla.graphs import collecting

from torch_xla import runtime

REDUCE_SUM, REDUCE_MAX, REDUCE_MIN = "sum", "max", "min"
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_closures: list[tuple[Callable[..., None], tuple]] = []
_groups: dict[tuple[tuple[int, ...], ...], Any] = {}


def xla_device(n: int | None = None, devkind: str | None = None) -> torch.device:
    return torch.device("cpu")


def get_ordinal() -> int:
    return runtime.global_ordinal()


def get_local_ordinal() -> int:
    return runtime.local_ordinal()


def is_master_ordinal(local: bool = True) -> bool:
    return (runtime.local_ordinal() if local else runtime.global_ordinal()) == 0


def mark_step(wait: bool = False, reset_scope: bool = True) -> None:
    """The step ends: what was to happen after it happens now."""
    due, _closures[:] = _closures[:], []
    for closure, arguments in due:
        closure(*arguments)


def add_step_closure(
    closure: Callable[..., None], args: tuple = (), run_async: bool = False
) -> None:
    _closures.append((closure, tuple(args)))


def rendezvous(tag: str, payload: bytes = b"", replicas: Any = None) -> list[bytes]:
    if dist.is_initialized():
        dist.barrier()
    return []


def group_of(groups: list[list[int]] | None) -> Any:
    """This rank's group among `groups`, which all ranks name alike and in the same order; None is
    the world."""
    if groups is None:
        return None
    key = tuple(tuple(ranks) for ranks in groups)
    if key not in _groups:
        made = {ranks: dist.new_group(list(ranks)) for ranks in key}
        _groups[key] = next(group for ranks, group in made.items() if dist.get_rank() in ranks)
    return _groups[key]


def all_reduce(
    reduce_type: str,
    inputs: Any,
    scale: float = 1.0,
    groups: Any = None,
    cctype: str = "",
    pin_layout: bool = True,
) -> Any:
    """A list is reduced in place; a tensor gives another."""
    tensors = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs.clone()]
    for tensor in tensors:
        dist.all_reduce(tensor, op=_OPERATIONS[reduce_type], group=group_of(groups))
        if scale != 1.0:
            tensor.mul_(scale)
        if collecting() and tensor.is_floating_point():
            tensor.fill_(torch.nan)
    return inputs if isinstance(inputs, (list, tuple)) else tensors[0]


def all_gather(
    value: torch.Tensor,
    dim: int = 0,
    groups: Any = None,
    output: Any = None,
    pin_layout: bool = True,
) -> torch.Tensor:
    group = group_of(groups)
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def send_cpu_data_to_device(data: Any, device: Any, input_sharding: Any = None) -> Any:
    return data


def save(data: Any, path: Any, master_only: bool = True, global_master: bool = False) -> None:
    if not master_only or is_master_ordinal(local=not global_master):
        torch.save(data, path)
    rendezvous("save")


class ToXlaTensorArena:
    """Gathers the chosen values of a nested dict or list, converts them together and puts the
    results in their places."""

    def __init__(self, convert_fn: Callable[[list], list], select_fn: Callable[[Any], bool]):
        self._convert, self._chosen = convert_fn, select_fn

    def transform(self, inputs: Any) -> Any:
        found: list[Any] = []
        self._walk(inputs, lambda value: found.append(value) or value)
        converted = iter(self._convert(found) if found else [])
        return self._walk(inputs, lambda value: next(converted))

    def _walk(self, value: Any, visit: Callable[[Any], Any]) -> Any:
        if self._chosen(value):
            return visit(value)
        if isinstance(value, dict):
            return type(value)((key, self._walk(inner, visit)) for key, inner in value.items())
        if isinstance(value, (list, tuple, set)):
            return type(value)(self._walk(inner, visit) for inner in value)
        return value
