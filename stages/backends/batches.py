"""The packed rows that the data stage published, and the order in which training reads them.

The order is a pure function of (SEED, step): there is no loader state to save, and a run resumes exactly, also on
another number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.run.layout import SEQUENCE_COLUMNS


class PackedSequences:
    """The rows of one split, read from disk as they are asked for: `rows.batch([3, 1])`."""

    def __init__(self, split: Path):
        from datasets import load_from_disk

        self._table = load_from_disk(str(split)).with_format(
            "numpy", columns=list(SEQUENCE_COLUMNS)
        )

    def __len__(self) -> int:
        return len(self._table)

    def batch(self, indices: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """int64 tensors [len(indices), MAX_LENGTH] by column."""
        columns = self._table[indices.tolist()]
        return {
            name: torch.from_numpy(np.asarray(columns[name], dtype=np.int64)).to(device)
            for name in SEQUENCE_COLUMNS
        }

    def in_order(self, size: int) -> Iterator[np.ndarray]:
        """Indices of the rows in their order, `size` at a time."""
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self)))


def sequences_of_step(step: int, count: int, rows: int, seed: int) -> np.ndarray:
    """Indices of the `count` rows of global batch `step` (from 0), out of `rows`.

    The epochs are one endless stream of permutations cut into global batches, so that every batch is full and no row
    is dropped; the last batch of an epoch may reach into the next.
    """
    stream = np.arange(step * count, (step + 1) * count)
    epochs = stream // rows
    order = {
        epoch: np.random.default_rng([seed, epoch]).permutation(rows)
        for epoch in np.unique(epochs).tolist()
    }
    return np.array(
        [
            order[epoch][index]
            for epoch, index in zip(epochs.tolist(), (stream % rows).tolist(), strict=True)
        ]
    )
