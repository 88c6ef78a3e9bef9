"""Documents: examples as token ids on the disk; only what packing needs of each is in memory.

A document is an example as its prompt format writes it. Its ids go to an unnamed temporary file
(int32, with a bit that marks those of answers), so memory grows by some 200 bytes per document,
packing included, however long the documents are.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from hashlib import blake2b
from heapq import nsmallest
from itertools import chain
from pathlib import Path

import numpy as np

from stages.run.errors import InputError, StageFailure
from stages.text.conversation import Conversation
from stages.text.examples import PROBLEMS_SHOWN, Example
from stages.text.pieces import ROLES, Piece, Run, encode_pieces
from stages.text.prompt import PromptFormat
from stages.text.tokens import TextTokenizer

# Set in the ids of tokens that the model is to say; no vocabulary has so many ids.
ANSWER = np.int32(2**30)
QUESTIONS = 100  # held-out examples that are kept as questions, at most


@dataclass(frozen=True)
class Encoded:
    """The documents of one batch of examples. `ids`: int32, all documents end to end, those of
    answers with the bit ANSWER; `of_messages`: bool, which are a message's and not the template's;
    per document `lengths` and `prompt_lengths` (tokens before the
    first answer), int64, and `digests`, uint64: equal for the documents of one conversation.

    `roles`: tokens per role of ROLES. `per_answer`: documents beyond one per example. `sample`: the
    text of the document with the greatest digest. `smallest`: digest -> conversation of the
    examples with the smallest digests, of which some may be held out.
    """

    ids: np.ndarray
    of_messages: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    digests: np.ndarray
    roles: np.ndarray
    split_again: int
    per_answer: int
    sample: str
    smallest: dict[int, Conversation]


def encode(
    examples: list[Example], tokenizer: TextTokenizer, format: PromptFormat, seed: int = 0
) -> Encoded:
    """The documents of `examples` as ids. Eval gives the model the same ids of a prompt.

    Raises InputError that names the examples that the format cannot write, or whose text cannot be
    kept apart from control tokens or from the prompt; and StageFailure if a document has other
    control tokens than the format wrote.
    """
    written = format.documents([example.messages for example in examples])
    documents = [one for made in written if not isinstance(made, str) for one in made]
    encoded = iter(encode_pieces(documents, tokenizer, format.starts_text))
    problems, runs, digests, texts = [], list[list[Run]](), [], []
    conversations: dict[int, Conversation] = {}
    for example, made in zip(examples, written, strict=True):
        if isinstance(made, str):
            problems.append(f"{example.place}: {made}")
            continue
        text = "".join(piece.text for piece in made[-1] if piece.control is None)
        for pieces in made:
            if (one := next(encoded)) is None:
                problems.append(
                    f"{example.place}: this tokenizer cannot encode the text without its control "
                    "tokens, or an answer apart from its prompt. Remove the example."
                )
                continue
            runs.append(one)
            digests.append(digest(text, seed))
            texts.append(pieces)
            conversations[digests[-1]] = example.messages
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        raise InputError(
            problems[:PROBLEMS_SHOWN] + [f"... and {more:,} more of this batch"] * (more > 0)
        )
    smallest = smallest_digests(conversations)
    return _joined(runs, digests, texts, len(examples), tokenizer, smallest)


def _joined(
    documents: list[list[Run]],
    digests: list[int],
    pieces: list[list[Piece]],
    examples: int,
    tokenizer: TextTokenizer,
    smallest: dict[int, Conversation],
) -> Encoded:
    runs = list(chain.from_iterable(documents))
    sizes = np.fromiter((len(run.ids) for run in runs), np.int64, count=len(runs))
    answers = np.fromiter((run.answer for run in runs), bool, count=len(runs))
    roles = np.fromiter((ROLES.index(run.role) for run in runs), np.int64, count=len(runs))
    counts = np.fromiter(map(len, documents), np.int64, count=len(documents))
    ids = np.fromiter(
        chain.from_iterable(run.ids for run in runs), np.int32, count=int(sizes.sum())
    )
    of_document = np.repeat(np.arange(len(documents)), counts)
    lengths = np.bincount(of_document, sizes, len(documents)).astype(np.int64)
    # Runs before the first answer of their document.
    before = np.add.accumulate(answers) - np.repeat(
        np.concatenate([[0], np.add.accumulate(np.bincount(of_document, answers))[:-1]]), counts
    )
    prompts = np.bincount(of_document, sizes * (before == 0), len(documents)).astype(np.int64)
    _check_controls(ids, pieces, tokenizer)
    greatest = max(range(len(digests)), key=digests.__getitem__)
    return Encoded(
        np.where(np.repeat(answers, sizes), ids | ANSWER, ids),
        np.repeat(roles != ROLES.index("template"), sizes),
        lengths,
        prompts,
        np.array(digests, np.uint64),
        np.bincount(roles, sizes, len(ROLES)).astype(np.int64),
        sum(run.split_again for run in runs),
        len(documents) - examples,
        "".join(piece.text for piece in pieces[greatest]),
        smallest,
    )


def smallest_digests(conversations: dict[int, Conversation]) -> dict[int, Conversation]:
    """At most QUESTIONS of the conversations, those with the smallest digests."""
    return {one: conversations[one] for one in nsmallest(QUESTIONS, conversations)}


def _check_controls(ids: np.ndarray, pieces: list[list[Piece]], tokenizer: TextTokenizer) -> None:
    """Raise StageFailure unless the control tokens are those that the format wrote, in order."""
    lookup = np.zeros(int(ids.max(initial=max(tokenizer.controls))) + 1, dtype=bool)
    lookup[list(tokenizer.controls)] = True
    wanted = [piece.control for piece in chain.from_iterable(pieces) if piece.control is not None]
    if not np.array_equal(ids[lookup[ids]], wanted):
        raise StageFailure(
            "A document has other control tokens than its prompt format wrote. The tokenizer's "
            "tokenizer.json contradicts itself."
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

    def append(self, encoded: Encoded) -> None:
        self._file.write(encoded.ids.data)
        self._batches.append((encoded.lengths, encoded.prompt_lengths, encoded.digests))

    def close_input(self) -> None:
        """End the input: build the arrays and allow `read_into`."""
        self._file.flush()
        empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64))
        self.lengths, self.prompt_lengths, self.digests = map(
            np.concatenate, zip(empty, *self._batches, strict=True)
        )
        self._batches.clear()
        self._offsets = np.cumsum(self.lengths) - self.lengths

    def read_into(self, ids: np.ndarray, document: int, start: int) -> None:
        """Fill `ids`, int32, with the ids of a document from its token `start`, those of answers
        with ANSWER.

        A memory map is not used: its pages would count as memory of this process.
        """
        place = 4 * (int(self._offsets[document]) + start)
        if os.preadv(self._file.fileno(), [ids.data], place) != ids.nbytes:
            raise StageFailure("The temporary file of the documents' ids is cut short.")

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
