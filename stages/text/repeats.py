"""Documents that repeat each other: near duplicates, and what is held out but trained on as well.

Of a document a few hashes remain, 72 bytes, of at most MOST documents: memory has a bound. The
hashes are of token ids, which the tokenizer has made anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.text.documents import ANSWER, Encoded

MOST = 1_000_000  # documents that are compared
SHINGLE = 5  # neighbouring tokens
# Two documents are near duplicates if they have one whole band of their MinHash signatures in
# common. With shingles of which a share s is common, the probability is 1 - (1 - s^8)^8: 0.99 for
# s = 0.9, 0.77 for 0.8, 0.38 for 0.7, 0.03 for 0.5 (Leskovec, Rajaraman and Ullman, Mining of
# Massive Datasets, 3.4.2).
BANDS, ROWS, SEED = 8, 8, 42
_FACTOR, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(29)


@dataclass(frozen=True)
class Repeated:
    """How many documents repeat others. `compared`: different documents. `near`: those of them that
    nearly equal an earlier one. Of the `held_out` documents, `near_training` nearly equal one that
    is trained on, and `asked_in_training` ask what one of those asks. Of the `prompts` in PROMPTS,
    `prompts_in_training` are asked by one that is trained on. `not_compared`: documents after the
    first MOST."""

    compared: int
    near: int
    held_out: int
    near_training: int
    asked_in_training: int
    prompts: int
    prompts_in_training: int
    not_compared: int


class Repeats:
    """What is remembered of the documents of a dataset, batch by batch. `prompts`: the ids of each
    question of PROMPTS."""

    def __init__(self, prompts: Sequence[Sequence[int]] = ()) -> None:
        self._prompts = prompts
        self._bands, self._questions = list[np.ndarray](), list[np.ndarray]()
        self._count = 0

    def add(self, encoded: Encoded) -> None:
        if self._count < MOST:
            self._bands.append(band_hashes(encoded))
            ids, lengths = encoded.ids & ~ANSWER, encoded.prompt_lengths
            starts = np.cumsum(encoded.lengths) - encoded.lengths
            places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            asked = np.repeat(starts, lengths) + places
            # A text without a prompt asks nothing: only the template's tokens are before it.
            document = np.repeat(np.arange(len(lengths)), lengths)
            asks = np.bincount(document, encoded.of_messages[asked], len(lengths)) > 0
            self._questions.append(
                np.where(asks, _ordered(ids[asked], lengths, places), np.uint64(0))
            )
        self._count += len(encoded.lengths)

    def compare(
        self, digests: np.ndarray, kept: np.ndarray, for_validation: np.ndarray
    ) -> Repeated:
        """`digests`: uint64 [documents], in the order in which they were added. `kept`: int64,
        numbers of the documents that were not dropped, and `for_validation`: bool, which of them
        are held out. What was remembered of them is forgotten: packing needs the memory."""
        of_batches, asked = self._bands, self._questions
        self._bands, self._questions = [], []
        inside = kept < sum(map(len, of_batches))
        kept, for_validation = kept[inside], for_validation[inside]
        # A conversation has one digest, also where each of its answers has a document of its own:
        # the last of them has all its messages.
        _, last = np.unique(digests[kept][::-1], return_index=True)
        first = np.sort(len(kept) - 1 - last)
        held_out = for_validation[first]
        near, in_training = np.zeros(len(first), bool), np.zeros(len(first), bool)
        for number in range(BANDS):  # one at a time, which takes an eighth of the memory
            band = np.concatenate([bands[:, number] for bands in of_batches])[kept[first]]
            _, earliest, which = np.unique(band, return_index=True, return_inverse=True)
            near |= earliest[which] < np.arange(len(band))
            in_training |= held_out & np.isin(band, band[~held_out])
        questions = np.concatenate(asked)[kept]
        trained = questions[~for_validation & (questions != 0)]
        lengths = np.array([len(ids) for ids in self._prompts], np.int64)
        flat = np.array([id for ids in self._prompts for id in ids], np.int32)
        places = np.array([place for ids in self._prompts for place in range(len(ids))], np.int64)
        return Repeated(
            compared=len(first),
            near=int(near.sum()),
            held_out=int(held_out.sum()),
            near_training=int(in_training.sum()),
            asked_in_training=int(np.isin(questions[first][held_out], trained).sum()),
            prompts=len(self._prompts),
            prompts_in_training=int(np.isin(_ordered(flat, lengths, places), trained).sum()),
            not_compared=int((~inside).sum()),
        )


def band_hashes(encoded: Encoded) -> np.ndarray:
    """The bands of each document's MinHash signature, uint64 [documents, BANDS]. The template's
    tokens are left out: all documents have those."""
    from rensa import RMinHash

    of_document = np.repeat(np.arange(len(encoded.lengths)), encoded.lengths)[encoded.of_messages]
    ids = (encoded.ids[encoded.of_messages] & ~ANSWER).astype(np.uint64) + np.uint64(1)
    shingles = np.zeros(len(ids), np.uint64)
    for ahead in range(SHINGLE):
        same = of_document[ahead:] == of_document[: len(ids) - ahead]
        np.bitwise_xor(shingles[: len(same)], ids[ahead:], out=shingles[: len(same)], where=same)
        shingles = _mixed(shingles)
    counts = np.bincount(of_document, minlength=len(encoded.lengths))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, BANDS * ROWS, SEED)
    rows = np.array(matrix.to_rows(), np.uint64).reshape(-1, BANDS, ROWS)
    bands = np.zeros(rows.shape[:2], np.uint64)
    for row in range(ROWS):
        bands = _mixed(bands ^ rows[:, :, row])
    # A document without a token of a message is like no other.
    return np.where((counts == 0)[:, None], encoded.digests[:, None], bands)


def _ordered(ids: np.ndarray, lengths: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A hash of each text's ids in their order, uint64 [texts]; 0 for a text without any.
    `places`: the place of each id in its text."""
    mixed = _mixed(_mixed(ids.astype(np.uint64) + np.uint64(1)) + places.astype(np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    ends = np.cumsum(lengths)
    return sums[ends] - sums[ends - lengths]


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Each hash with its bits spread; as SplitMix64 does, modulo 2^64."""
    hashes = hashes * _FACTOR
    return hashes ^ (hashes >> _SHIFT)
