"""Documents: examples as token ids on the disk; only what packing needs of each is in memory.

A document is BOS, the prompt and the response of an example, and EOS. Its ids go to an unnamed
temporary file (int32), so memory grows by some 200 bytes per document, packing included, however
long the documents are.
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
    """The documents of one batch of examples. `ids`: int32, all documents end to end; `lengths`,
    `prompt_lengths`: int64 per document."""

    ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    split_again: int


def encode(examples: list[Example], tokenizer: TextTokenizer, template: PromptTemplate) -> Encoded:
    """The ids of each example: BOS, prompt, response, EOS. Eval gives the model the same ids of a
    prompt.

    Raises InputError that names the examples whose text cannot be kept apart from control tokens or
    from the prompt, and StageFailure if a document does not have exactly one BOS (where the
    tokenizer has one) and one EOS.
    """
    prompts = tokenizer.encode_prompts(
        [template.prompt(example.instruction, example.context) for example in examples]
    )
    responses, split_again = tokenizer.encode_responses(
        template.response, [example.response for example in examples]
    )
    failed = [
        example.place
        for example, *parts in zip(examples, prompts, responses, strict=True)
        if None in parts
    ]
    if failed:
        reason = (
            "this tokenizer cannot encode the text without its control tokens, or the "
            "response apart from the prompt. Remove the example."
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
    """Raise StageFailure unless each document has one BOS, one EOS and no other control token."""
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
        """Write the ids to `folder`'s file system, in a file without a name: nothing remains after
        a kill."""
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
        """End the input: build the arrays and allow `read`."""
        self._file.flush()
        empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64))
        self.lengths, self.prompt_lengths, self.digests = map(
            np.concatenate, zip(empty, *self._batches, strict=True)
        )
        self._batches.clear()
        self._offsets = (np.cumsum(self.lengths) - self.lengths).tolist()

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """`length` ids of a document from its token `start`, int32.

        A memory map is not used: its pages would count as memory of this process.
        """
        data = os.pread(self._file.fileno(), 4 * length, 4 * (self._offsets[document] + start))
        return np.frombuffer(data, dtype=np.int32)

    def close(self) -> None:
        self._file.close()


def digest(text: str, seed: int) -> int:
    """A document's text and a seed as a 64-bit digest: equal texts have equal digests, the order of
    others is random.

    The probability that two different ones among a million documents share a digest is 3e-8.
    """
    return int.from_bytes(
        blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest(), "little"
    )


def held_out(digests: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are for validation, bool [documents]: the round(fraction x documents) ones
    with the smallest digests.

    At least one and never all. Equal documents stay together, so a few more may be held out; if all
    are equal, none is.
    """
    chosen = np.zeros(len(digests), dtype=bool)
    distinct, copies = np.unique(digests, return_counts=True)
    if fraction > 0 and len(distinct) > 1:
        count = max(1, round(fraction * len(digests)))
        groups = min(int(np.searchsorted(np.cumsum(copies), count)) + 1, len(distinct) - 1)
        chosen = digests <= distinct[groups - 1]
    return chosen
