from __future__ import annotations

from bisect import bisect_left, insort
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.text.packing import best_fit, concat
from tests.torture.plugin import examples

CAPACITY = 64
fitting = st.lists(st.integers(1, CAPACITY), max_size=80)
any_length = st.lists(st.integers(1, 4 * CAPACITY), max_size=40)


def tokens(packing):
    """(document, token) of every token, row by row."""
    return [
        [(d, at) for d, start, length in row for at in range(start, start + length)]
        for row in packing.sequences()
    ]


@pytest.mark.torture("fuzz")
@examples(100, 1_000)
@given(fitting)
def test_best_fit_keeps_every_token_exactly_once(lengths):
    everything = sorted(chain.from_iterable(tokens(best_fit(lengths, CAPACITY))))
    assert everything == [
        (document, at) for document, length in enumerate(lengths) for at in range(length)
    ]


@pytest.mark.torture("fuzz")
@examples(100, 1_000)
@given(fitting)
def test_best_fit_cuts_no_document(lengths):
    for row in best_fit(lengths, CAPACITY).sequences():
        assert all((start, length) == (0, lengths[document]) for document, start, length in row)


@pytest.mark.torture("fuzz")
@examples(100, 1_000)
@given(fitting)
def test_best_fit_overfills_no_row_and_leaves_none_empty(lengths):
    assert all(
        1 <= sum(segment.length for segment in row) <= CAPACITY
        for row in best_fit(lengths, CAPACITY).sequences()
    )


@pytest.mark.torture("fuzz")
@examples(100, 1_000)
@given(fitting)
def test_best_fit_orders_rows_by_their_first_document_and_documents_within_them(lengths):
    rows = [
        [segment.document for segment in row] for row in best_fit(lengths, CAPACITY).sequences()
    ]
    assert rows == sorted(sorted(row) for row in rows)


@pytest.mark.torture("fuzz")
@examples(100, 1_000)
@given(fitting)
def test_best_fit_uses_as_many_rows_as_the_textbook_algorithm(lengths):
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(rooms, length)
        insort(rooms, (rooms.pop(at) if at < len(rooms) else CAPACITY) - length)
    assert len(best_fit(lengths, CAPACITY)) == len(rooms)


@pytest.mark.parametrize("lengths", [[CAPACITY + 1], [0], [3, -1]])
def test_best_fit_refuses_lengths_that_fit_no_row(lengths):
    with pytest.raises(ValueError, match="fit a sequence"):
        best_fit(lengths, CAPACITY)


@pytest.mark.torture("fuzz")
@examples(100, 1_000)
@given(any_length)
def test_concat_is_the_documents_end_to_end_cut_at_the_capacity(lengths):
    joined = [(document, at) for document, length in enumerate(lengths) for at in range(length)]
    whole = len(joined) // CAPACITY
    assert tokens(concat(lengths, CAPACITY)) == [
        joined[row * CAPACITY : (row + 1) * CAPACITY] for row in range(whole)
    ]


@pytest.mark.torture("fuzz")
@examples(100, 1_000)
@given(any_length)
def test_a_row_of_concat_holds_each_document_in_one_segment(lengths):
    for row in concat(lengths, CAPACITY).sequences():
        assert len({segment.document for segment in row}) == len(row)


@pytest.mark.torture("fuzz")
@examples(100, 1_000)
@given(fitting, st.integers(0, 20), st.integers(0, 20))
def test_a_range_of_rows_is_that_part_of_all(lengths, begin, count):
    packing = best_fit(lengths, CAPACITY)
    assert (
        list(packing.sequences(begin, begin + count))
        == list(packing.sequences())[begin : begin + count]
    )


@pytest.mark.parametrize("pack", [best_fit, concat])
def test_no_documents_give_no_rows(pack):
    assert len(pack(np.zeros(0, np.int64), CAPACITY)) == 0


def test_many_documents_fill_their_rows():
    lengths = np.random.default_rng(0).integers(1, 400, size=5_000)
    packing = best_fit(lengths, 2048)
    assert lengths.sum() / (len(packing) * 2048) > 0.999
