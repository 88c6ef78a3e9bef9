"""Loaders that move batches to the device: on a CPU they are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class MpDeviceLoader:
    def __init__(self, loader: Any, device: Any, **more: Any):
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)


ParallelLoader = PerDeviceLoader = MpDeviceLoader
