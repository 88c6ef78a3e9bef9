"""Packed attention is masked attention, with the pairs left out that no query sees."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from stages.backends.torch import attention
from stages.backends.torch.attention import first_visible, packed_attention


def positions_of(documents: list[list[int]]) -> Tensor:
    """[batch, length] from the documents' lengths in each sequence."""
    return torch.stack([torch.cat([torch.arange(one) for one in row]) for row in documents])


def masked(queries: Tensor, keys: Tensor, values: Tensor, first: Tensor, scale: float) -> Tensor:
    """The same by torch's own attention, over all pairs."""
    index = torch.arange(first.shape[1])
    seen = (index >= first[:, None, :, None]) & (index <= index[:, None])
    return functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=seen, scale=scale, enable_gqa=True
    )


def results(function: object, tensors: list[Tensor], first: Tensor, outer: Tensor) -> list[Tensor]:
    """The context and the gradients of queries, keys and values."""
    found = function(*tensors, first, 0.3)  # type: ignore[operator]
    return [found.detach(), *torch.autograd.grad(found, tensors, outer)]


def tensors_of(
    first: Tensor, heads: int, kv_heads: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values as transformers has them, and a gradient of the context."""
    generator = torch.Generator().manual_seed(1)
    batch, length = first.shape

    def random(count: int) -> Tensor:
        drawn = torch.randn(batch, length, count, 8, generator=generator).to(dtype)
        return drawn.transpose(1, 2).requires_grad_()

    return [random(heads), random(kv_heads), random(kv_heads)], random(heads).detach()


@st.composite
def packings(draw: st.DrawFn) -> list[list[int]]:
    """One to three sequences of equal length, cut into documents."""
    length = draw(st.integers(1, 40))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted({0, length, *draw(st.lists(st.integers(1, length), max_size=4))})
        rows.append([end - start for start, end in pairwise(cuts)])
    return rows


@settings(max_examples=60, deadline=None)
@given(
    packings(),
    st.sampled_from([(1, 1), (4, 4), (6, 3), (6, 2)]),
    st.none() | st.integers(1, 9),
    st.sampled_from([1, 3, 8, 128]),
)
def test_it_is_masked_attention_and_so_are_its_gradients(
    documents: list[list[int]],
    heads: tuple[int, int],
    window: int | None,
    block: int,
) -> None:
    first = first_visible(positions_of(documents), window)
    tensors, outer = tensors_of(first, *heads)
    expected = results(masked, tensors, first, outer)
    attention._blocks_of.cache_clear()
    before, attention.BLOCK = attention.BLOCK, block
    try:
        found = results(packed_attention, tensors, first, outer)
    finally:
        attention.BLOCK = before
        attention._blocks_of.cache_clear()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_as_near_to_the_truth_as_twice_the_error_of_torchs_own() -> None:
    first = first_visible(positions_of([[200, 100, 33], [1, 332]]))
    tensors, outer = tensors_of(first, 6, 3, torch.bfloat16)
    double = [tensor.detach().double().requires_grad_() for tensor in tensors]
    truth = results(masked, double, first, outer.double())

    def errors(function: object) -> list[float]:
        found = results(function, tensors, first, outer)
        return [
            float((one.double() - true).norm() / true.norm())
            for one, true in zip(found, truth, strict=True)
        ]

    for ours, theirs in zip(errors(packed_attention), errors(masked), strict=True):
        assert ours <= 2 * theirs


def test_it_gives_the_same_bits_every_time() -> None:
    first = first_visible(positions_of([[200, 100, 33], [1, 332]]))
    tensors, outer = tensors_of(first, 6, 3)
    once, again = (results(packed_attention, tensors, first, outer) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def test_torch_finds_nothing_to_say_about_the_operation() -> None:
    first = first_visible(positions_of([[5, 8]]))
    tensors, _ = tensors_of(first, 4, 2)
    torch.library.opcheck(packed_attention, (*tensors, first, 0.3))
