"""A group of one process."""

from __future__ import annotations


class _Group:
    def size(self) -> int:
        return 1


def model_parallel_is_initialized() -> bool:
    return True


def get_tensor_model_parallel_group() -> _Group:
    return _Group()


def get_kv_shared_group() -> _Group:
    return _Group()


def get_tensor_model_parallel_size() -> int:
    return 1
