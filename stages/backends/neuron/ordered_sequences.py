"""The dataset of NeuronTrainer: the packed sequences in the order of every backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from stages.backends.batches import PackedSequences, sequences_of_step
from stages.backends.loss import supervised
from stages.run.layout import IGNORED_LABEL, TRAIN_SPLIT


class OrderedSequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The packed sequences of steps `first` to `first + steps` (exclusive), one after another.

    Rank r of n data-parallel ranks takes every n-th. An item has int64 `input_ids`,
    `attention_mask` and `labels`, each [length]. The labels are those of the torch backend's loss:
    no position predicts the first token of a document.
    """

    def __init__(self, data: Path, first: int, steps: int, *, sequences_per_step: int, seed: int):
        self._table = PackedSequences(data / TRAIN_SPLIT)
        self.count, self.sequences_per_step = len(self._table), sequences_per_step
        self.order = np.concatenate(
            [
                sequences_of_step(first + step, sequences_per_step, self.count, seed)
                for step in range(steps)
            ]
        )
        self.length = len(self[0]["input_ids"])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = self._table.batch(self.order[[index]], torch.device("cpu"))
        sequence = {name: column[0] for name, column in batch.items()}
        first_tokens = sequence["position_ids"] == 0
        return {
            "input_ids": sequence["input_ids"],
            "attention_mask": torch.ones_like(sequence["input_ids"]),
            "labels": sequence["labels"].masked_fill(first_tokens, IGNORED_LABEL),
        }

    def supervised_tokens(self, step: int) -> int:
        """The tokens that the loss counts in the global batch of the `step`-th step, from 0."""
        indices = self.order[step * self.sequences_per_step : (step + 1) * self.sequences_per_step]
        batch = self._table.batch(indices, torch.device("cpu"))
        return int(supervised(batch["labels"], batch["position_ids"]).sum())
