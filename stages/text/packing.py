"""Packing: which tokens of which documents share a sequence of fixed length.

Uses only lengths and returns a `Packing`, a list of segments per sequence. `best_fit` cuts no
document; `concat` is the usual "concatenate and cut into chunks". Both are deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """`length` tokens of document number `document`, from its token `start`."""

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class Packing:
    """Sequences of segments as flat arrays: sequence s has the segments `first[s]:first[s + 1]`.

    `documents`, `starts`, `lengths`: int64 [segments]; `first`: int64 [sequences + 1].
    """

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1

    def sequences(self, begin: int = 0, end: int | None = None) -> Iterator[list[Segment]]:
        """The segments of each of the sequences begin:end, in order."""
        for low, high in zip(
            self.first[begin:end].tolist(), self.first[begin + 1 :].tolist(), strict=False
        ):
            columns = (
                self.documents[low:high].tolist(),
                self.starts[low:high].tolist(),
                self.lengths[low:high].tolist(),
            )
            yield [Segment(*segment) for segment in zip(*columns, strict=True)]


def best_fit(lengths: np.ndarray, capacity: int) -> Packing:
    """Best-fit decreasing: each document, longest first, goes to the fullest sequence that still
    has room for it.

    `lengths`: tokens per document, int [documents], each 1..capacity. Uses at most 11/9 of the
    fewest sequences possible, plus one (Johnson et al., SIAM J. Comput. 3, 1974). Sequences are
    ordered by their earliest document and documents stay in order within a sequence, so that the
    result does not sort a dataset by length. Near-linear: see `_assign`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"documents of {lengths.min()} to {lengths.max()} tokens do not all fit a "
            f"sequence of {capacity}."
        )
    sequence_of = _assign(lengths, capacity)
    # Number sequences by first appearance in document order.
    names, first_seen, inverse = np.unique(sequence_of, return_index=True, return_inverse=True)
    rank = np.empty(len(names), dtype=np.int64)
    rank[np.argsort(first_seen)] = np.arange(len(names))
    sequence_of = rank[inverse]
    documents = np.argsort(sequence_of, kind="stable")
    first = np.zeros(len(names) + 1, dtype=np.int64)
    np.cumsum(np.bincount(sequence_of, minlength=len(names)), out=first[1:])
    return Packing(documents, np.zeros_like(documents), lengths[documents], first)


def _assign(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The sequence of each document, int64 [documents], by best-fit decreasing.

    Open sequences are in stacks by the room that remains in them. The stacks that are not empty are
    the set bits of one integer, so "the least room that is enough" is its lowest bit from `length`
    on: a shift and a mask of capacity/64 machine words, where a scan or a tree would cost a Python
    loop.
    """
    sequence_of = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, count, chosen = 0, 0, []
    for length in lengths[order].tolist():
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            sequence = stacks[room].pop()
            if not stacks[room]:
                rooms ^= 1 << room
        else:
            room, sequence = capacity, count
            count += 1
        remaining = room - length
        if remaining:
            stacks[remaining].append(sequence)
            rooms |= 1 << remaining
        chosen.append(sequence)
    sequence_of[order] = chosen
    return sequence_of


def concat(lengths: np.ndarray, capacity: int) -> Packing:
    """All documents end to end, cut at every `capacity` tokens; the last, incomplete sequence is
    dropped.

    `lengths`: tokens per document, int [documents], each at least 1. Does the same as the Dolly
    tutorial's `chunk`, which carries the remainder of one batch of examples to the next, so that
    the result does not depend on the batches.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    count = int(ends[-1]) // capacity if len(ends) else 0
    edges = np.arange(count + 1, dtype=np.int64) * capacity
    begins = ends - lengths
    cuts = np.union1d(begins[begins < edges[-1]], edges)
    documents = np.searchsorted(ends, cuts[:-1], side="right")
    return Packing(
        documents, cuts[:-1] - begins[documents], np.diff(cuts), np.searchsorted(cuts, edges)
    )
