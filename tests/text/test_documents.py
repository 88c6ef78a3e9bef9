from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.run.errors import StageFailure
from stages.text.documents import Documents, digest, held_out
from tests.torture.plugin import examples

fractions = st.floats(0, 0.99)


@pytest.mark.torture("fuzz")
@examples(100, 1_000)
@given(st.sets(st.integers(0, 2**64 - 1), min_size=2), fractions)
def test_as_many_documents_are_held_out_as_the_fraction_says_but_never_none_nor_all(
    digests, fraction
):
    chosen = held_out(np.array(sorted(digests), np.uint64), fraction)
    wanted = min(max(1, round(fraction * len(digests))), len(digests) - 1) if fraction else 0
    assert chosen.sum() == wanted


@pytest.mark.torture("fuzz")
@examples(100, 1_000)
@given(st.lists(st.integers(0, 5), min_size=1), fractions)
def test_equal_documents_land_on_the_same_side_and_some_remain_for_training(digests, fraction):
    array = np.array(digests, np.uint64)
    chosen = held_out(array, fraction)
    assert not set(array[chosen]) & set(array[~chosen])
    assert not chosen.all()


def test_the_seed_decides_which_documents_are_held_out():
    texts = [f"document {number}" for number in range(200)]
    one, same, other = (
        held_out(np.array([digest(text, seed) for text in texts], np.uint64), 0.1)
        for seed in (1, 1, 2)
    )
    assert (one == same).all()
    assert (one != other).any()


def test_a_document_stays_held_out_wherever_it_stands_in_the_dataset():
    texts = [f"document {number}" for number in range(50)]
    digests = np.array([digest(text, 3) for text in texts], np.uint64)
    assert (held_out(digests, 0.2) == held_out(digests[::-1], 0.2)[::-1]).all()


def test_ids_that_are_not_all_on_the_disk_are_a_failure(tmp_path: Path) -> None:
    documents = Documents(tmp_path)
    documents.lengths, documents._offsets = np.array([3]), [0]
    with pytest.raises(StageFailure, match="is cut short"):
        documents.read_into(np.zeros(3, np.int32), 0, 0)
    documents.close()
