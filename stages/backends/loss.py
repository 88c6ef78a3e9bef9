"""The loss of packed sequences: documents in a sequence do not attend to each other.

No document predicts the first token of the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.run.layout import IGNORED_LABEL

# The number of rows of logits is a multiple of this: for each number oneDNN makes, and keeps, a
# kernel, and a batch's tensors fit in the memory of those before.
ROWS = 64


def next_token_labels(labels: Tensor, position_ids: Tensor) -> Tensor:
    """The id that each position must predict, int64 [batch, length].

    That is the label of the next position; IGNORED_LABEL at the end of a document.
    """
    following = torch.full_like(labels, IGNORED_LABEL)
    following[:, :-1] = labels[:, 1:].masked_fill(position_ids[:, 1:] == 0, IGNORED_LABEL)
    return following


def supervised(labels: Any, position_ids: Any) -> Any:
    """The number of positions that the loss counts, per sequence [batch].

    Counts what `next_token_labels` supervises without building it. Takes tensors or numpy arrays.
    """
    return ((labels[:, 1:] != IGNORED_LABEL) & (position_ids[:, 1:] != 0)).sum(-1)


def loss_sum(
    model: Any, batch: Mapping[str, Tensor], isolated: bool = True, only_supervised: bool = True
) -> Tensor:
    """Sum of the cross-entropy in nats over a micro-batch, whose columns are int64 [batch, length].

    Positions restart at 0 with each document. Without an attention mask, transformers makes one of
    them in which a document sees itself alone, and no further back than a layer's sliding window.
    Not `isolated`, it sees all before it in the sequence, whose positions go on, as on
    optimum-neuron.
    `only_supervised`: no logits are computed where the loss counts none, so their number follows
    from the batch. Under tensor parallelism there are all: they stay sharded over the vocabulary,
    and the caller's `loss_parallel` reduces them.
    """
    positions = batch["position_ids"]
    targets = next_token_labels(batch["labels"], positions)
    rows, wanted = _supervised_rows(targets) if only_supervised else (None, targets.flatten())

    def select(_: Any, hidden: tuple[Tensor]) -> Tensor:
        return hidden[0].flatten(0, 1)[rows]

    hook = model.lm_head.register_forward_pre_hook(select) if only_supervised else None
    try:
        output = model(
            input_ids=batch["input_ids"],
            position_ids=positions
            if isolated
            else torch.arange(positions.shape[1], device=positions.device)[None],
            use_cache=False,
        )
    finally:
        if hook:
            hook.remove()
    return F.cross_entropy(
        output.logits.float().flatten(0, -2),
        wanted,
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )


def _supervised_rows(targets: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of the positions that the loss counts in the flattened batch, and their targets.

    Both int64, filled up with the first position and with IGNORED_LABEL to a multiple of ROWS.
    """
    flat = targets.flatten()
    rows = (flat != IGNORED_LABEL).nonzero().flatten()
    spare = -len(rows) % ROWS
    return F.pad(rows, (0, spare)), F.pad(flat[rows], (0, spare), value=IGNORED_LABEL)
