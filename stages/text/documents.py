"""Documents: the rows as token ids, on the disk, with what packing needs of each in memory.

A row with its prompt, its response, BOS and EOS is a document. Its ids go to an unnamed temporary
file (int32), so that memory grows by some 200 bytes per document, packing included, however long
the documents are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import numpy as np

from stages.run.errors import InputError, StageFailure
from stages.text.examples import Example
from stages.text.prompt import PromptTemplate
from stages.text.tokens import TextTokenizer


@dataclass(frozen=True)
class Encoded:
    """The documents of one batch of rows. `ids`: int32, all of them end to end; `lengths`,
    `prompt_lengths`: int64 per document."""

    ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    split_again: int


def encode(rows: list[Example], tokenizer: TextTokenizer, template: PromptTemplate) -> Encoded:
    """The ids of each row: BOS, prompt, response, EOS. The prompt's are those that eval gives the
    model, in one piece.

    Raises InputError naming the rows whose text cannot be kept apart from control tokens or from
    the prompt, StageFailure if a document had not exactly one BOS (where the tokenizer has one) and
    one EOS.
    """
    prompts = tokenizer.encode_prompts(
        [template.prompt(row.instruction, row.context) for row in rows]
    )
    responses, split_again = tokenizer.encode_responses(
        template.response, [row.response for row in rows]
    )
    failed = [
        row.place for row, *parts in zip(rows, prompts, responses, strict=True) if None in parts
    ]
    if failed:
        reason = (
            "this tokenizer cannot encode the text without its control tokens, or the "
            "response apart from the prompt. Take the row out."
        )
        raise InputError([f"{place}: {reason}" for place in failed[:10]])
    eos = (tokenizer.eos,)
    parts = [
        part
        for prompt, response in zip(prompts, responses, strict=True)
        for part in (prompt, response, eos)
        if part is not None
    ]
    sizes = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts)).reshape(-1, 3)
    ids = np.fromiter(chain.from_iterable(parts), dtype=np.int32, count=int(sizes.sum()))
    lengths = sizes.sum(axis=1)
    _check_controls(ids, lengths, tokenizer)
    return Encoded(ids, lengths, sizes[:, 0], split_again)


def _check_controls(ids: np.ndarray, lengths: np.ndarray, tokenizer: TextTokenizer) -> None:
    """One BOS and one EOS in each document, and no control token next to them."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    lookup = np.zeros(int(ids.max(initial=max(tokenizer.controls))) + 1, dtype=bool)
    lookup[list(tokenizer.controls)] = True
    framed = (ids[ends - 1] == tokenizer.eos).all() and all(
        (ids[starts + at] == id).all() for at, id in enumerate(tokenizer.bos)
    )
    if not framed or np.count_nonzero(lookup[ids]) != len(lengths) * (len(tokenizer.bos) + 1):
        raise StageFailure(
            "A document does not have exactly one BOS and one EOS. The tokenizer's tokenizer.json "
            "contradicts itself."
        )


class Documents:
    """The documents of a dataset, appended batch by batch and then read by number.

    After `close_input`: `lengths`, `prompt_lengths` int64 and `digests` uint64, one per document.
    """

    def __init__(self, folder: Path):
        """Spill to `folder`'s file system; the file has no name, so a kill leaves nothing
        behind."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (`close` closes it)
        self._batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def append(self, encoded: Encoded, digests: Iterable[int]) -> None:
        self._file.write(encoded.ids.data)
        self._batches.append(
            (
                encoded.lengths,
                encoded.prompt_lengths,
                np.fromiter(digests, np.uint64, count=len(encoded.lengths)),
            )
        )

    def close_input(self) -> None:
        """No more documents: make the arrays and allow `read`."""
        self._file.flush()
        empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64))
        self.lengths, self.prompt_lengths, self.digests = map(
            np.concatenate, zip(empty, *self._batches, strict=True)
        )
        self._batches.clear()
        self._offsets = (np.cumsum(self.lengths) - self.lengths).tolist()

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """`length` ids of a document from its token `start` on, int32. Not by memory map: its pages
        would count as ours."""
        data = os.pread(self._file.fileno(), 4 * length, 4 * (self._offsets[document] + start))
        return np.frombuffer(data, dtype=np.int32)

    def close(self) -> None:
        self._file.close()


def digest(text: str, seed: int) -> int:
    """8 bytes that stand for a document's text under a seed: equal texts have equal ones, others
    are in random order.

    64 bits: among a million documents two differing ones share theirs with a probability of 3e-8.
    """
    return int.from_bytes(
        blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest(), "little"
    )


def held_out(digests: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are for validation, bool [documents]: those of the least digests,
    round(fraction x documents) of them.

    At least one and never all; equal documents stay together (so a few more may go), and if all are
    equal none is held out.
    """
    chosen = np.zeros(len(digests), dtype=bool)
    distinct, copies = np.unique(digests, return_counts=True)
    if fraction > 0 and len(distinct) > 1:
        wanted = max(1, round(fraction * len(digests)))
        groups = min(int(np.searchsorted(np.cumsum(copies), wanted)) + 1, len(distinct) - 1)
        chosen = digests <= distinct[groups - 1]
    return chosen
