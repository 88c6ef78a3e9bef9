"""The loss with logits of supervised tokens alone, beside that with all logits."""

from __future__ import annotations

import pytest
import torch

from stages.backends.loss import ROWS, loss_sum
from stages.run.layout import IGNORED_LABEL
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("supervised", [0, 1, ROWS - 1, ROWS, ROWS + 1, 2 * 96 - 2])
def test_logits_of_supervised_tokens_alone_give_the_same_loss_and_gradients(
    supervised: int,
) -> None:
    """What fills up a multiple of ROWS counts nowhere, also for a batch without supervised tokens
    and for one that has too few others."""
    model = tiny_model("llama", tie_word_embeddings=True).train()
    generator = torch.Generator().manual_seed(supervised)
    ids = torch.randint(1, 60, (2, 96), generator=generator)
    positions = torch.arange(96).expand(2, 96)
    # The first token of a sequence is predicted by none.
    counted = (torch.randperm(2 * 95, generator=generator) < supervised).view(2, 95)
    labels = ids.masked_fill(~torch.nn.functional.pad(counted, (1, 0)), IGNORED_LABEL)
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    found = []
    for alone in (True, False):
        model.zero_grad()
        loss = loss_sum(model, batch, only_supervised=alone)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert (found[0][0] > 0) == (supervised > 0)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
