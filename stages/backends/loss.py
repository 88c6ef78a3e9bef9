"""The loss of packed rows: documents in a row do not see each other, and none predicts the first token of the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.run.layout import IGNORED_LABEL


def document_mask(position_ids: Tensor) -> Tensor:
    """Which position sees which: bool [batch, 1, length, length] from int positions [batch, length].

    Positions restart at 0 with each document, so a running count of zeros numbers the documents of a row. A position
    sees those of its own document up to itself.
    """
    document = (position_ids == 0).cumsum(dim=1)
    same = document[:, :, None] == document[:, None, :]
    return (same & same.new_ones(same.shape[1:]).tril())[:, None]


def next_token_labels(labels: Tensor, position_ids: Tensor) -> Tensor:
    """What each position is to predict, int64 [batch, length]: the label of the next, IGNORED_LABEL at a document's end."""
    following = torch.full_like(labels, IGNORED_LABEL)
    following[:, :-1] = labels[:, 1:].masked_fill(position_ids[:, 1:] == 0, IGNORED_LABEL)
    return following


def supervised(labels: Any, position_ids: Any) -> Any:
    """How many positions of each row the loss counts: `next_token_labels` without making them (tensors or numpy)."""
    return ((labels[:, 1:] != IGNORED_LABEL) & (position_ids[:, 1:] != 0)).sum(-1)


def loss_sum(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed cross-entropy in nats over a micro-batch of packed rows (int64 [batch, length] each).

    Under tensor parallelism the logits stay sharded over the vocabulary; the caller's `loss_parallel` reduces them.
    """
    positions = batch["position_ids"]
    output = model(
        input_ids=batch["input_ids"],
        position_ids=positions,
        attention_mask=document_mask(positions),
        use_cache=False,
    )
    targets = next_token_labels(batch["labels"], positions)
    return F.cross_entropy(
        output.logits.float().flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )
