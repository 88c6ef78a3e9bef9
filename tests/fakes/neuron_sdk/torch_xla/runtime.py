"""Ranks and world size, as torchrun gives them."""

from __future__ import annotations

import os

import torch.distributed as dist


def global_ordinal() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_ordinal() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def global_device_count() -> int:
    return world_size()


def device_type() -> str:
    return "NEURON"
