"""A tensor of the original model as parts of stored tensors, read a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.backends.neuron.shards.torch_archive import RowReader, StoredTensor
from stages.model.weights import PIECE_BYTES, TensorSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Part:
    """`length` rows (or columns) of a stored tensor, from `start` on."""

    stored: StoredTensor
    start: int
    length: int


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor of the original model, and the parts that make it up when they are joined along
    `dimension`."""

    spec: TensorSpec
    dimension: int
    parts: tuple[Part, ...]

    def read(self, reader: RowReader) -> Iterator[torch.Tensor]:
        """The whole tensor in blocks of rows of about PIECE_BYTES."""
        if self.dimension == 0:
            for part in self.parts:
                yield from _blocks(reader, part.stored, part.start, part.start + part.length)
            return
        import torch

        rows, *others = self.spec.shape
        count = max(1, PIECE_BYTES * rows // max(1, self.spec.nbytes))
        for first in range(0, rows, count):
            last = min(rows, first + count)
            shards = {part.stored: reader.rows(part.stored, first, last) for part in self.parts}
            block = torch.empty(last - first, *others, dtype=getattr(torch, self.spec.dtype))
            columns = block.split([part.length for part in self.parts], self.dimension)
            for part, column in zip(self.parts, columns, strict=True):
                column.copy_(shards[part.stored].narrow(self.dimension, part.start, part.length))
            yield block


def _blocks(
    reader: RowReader, stored: StoredTensor, first: int, last: int
) -> Iterator[torch.Tensor]:
    rows = max(
        1,
        PIECE_BYTES * stored.shape[0] // max(1, TensorSpec("", stored.shape, stored.dtype).nbytes),
    )
    for begin in range(first, last, rows):
        yield reader.rows(stored, begin, min(last, begin + rows))
