"""The packed sequences that the data stage published, and the order in which training reads them.

The order is a pure function of (SEED, step). There is no loader state to save, and a run resumes
exactly, also with another number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.run.layout import SEQUENCE_COLUMNS


class PackedSequences:
    """The sequences of one split, read from disk on demand: `sequences.batch([3, 1])`."""

    def __init__(self, split: Path):
        from datasets import load_from_disk

        self._table = load_from_disk(str(split)).with_format(
            "numpy", columns=list(SEQUENCE_COLUMNS)
        )

    def __len__(self) -> int:
        return len(self._table)

    def batch(self, indices: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """int64 tensors [len(indices), MAX_LENGTH] by column name."""
        columns = self._table[indices.tolist()]
        return {
            name: torch.from_numpy(np.asarray(columns[name], dtype=np.int64)).to(device)
            for name in SEQUENCE_COLUMNS
        }

    def in_order(self, size: int) -> Iterator[np.ndarray]:
        """The indices of all sequences in ascending order, `size` at a time."""
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self)))


def sequences_of_step(step: int, count: int, total: int, seed: int) -> np.ndarray:
    """Indices of the `count` sequences in global batch `step` (from 0), out of `total`.

    The epochs form one endless stream of permutations, cut into global batches: every batch is
    full and no sequence is dropped. The last batch of an epoch may reach into the next epoch.
    """
    stream = np.arange(step * count, (step + 1) * count)
    epochs = stream // total
    order = {
        epoch: np.random.default_rng([seed, epoch]).permutation(total)
        for epoch in np.unique(epochs).tolist()
    }
    return np.array(
        [
            order[epoch][index]
            for epoch, index in zip(epochs.tolist(), (stream % total).tolist(), strict=True)
        ]
    )
