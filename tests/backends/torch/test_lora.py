"""LoRA's dropout on a CPU, which draws its mask by bits."""

from __future__ import annotations

import pytest
import torch

from stages.backends.torch.lora import BitDropout


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999999])
@pytest.mark.parametrize("size", [(400, 501), (3,)], ids=["large", "odd"])
def test_dropout_keeps_as_many_as_torch_does_and_scales_them(
    p: float, size: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x = torch.ones(size, requires_grad=True)
    kept = BitDropout(p)(x)
    assert set(kept.unique().tolist()) <= {0.0, torch.tensor(1.0).div(1 - p).item()}
    if len(size) > 1:  # five standard deviations, and what p is rounded to
        off = abs(float((kept > 0).float().mean()) - (1 - p))
        assert off < 5 * (p * (1 - p) / kept.numel()) ** 0.5 + 2**-16
    kept.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, kept.detach())


def test_dropout_follows_from_the_seed_alone() -> None:
    x = torch.ones(1000)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(BitDropout(0.3)(x))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_nothing_is_dropped_without_a_rate_or_outside_training() -> None:
    x = torch.randn(100)
    assert torch.equal(BitDropout(0.0)(x), x)
    assert torch.equal(BitDropout(0.5).eval()(x), x)
