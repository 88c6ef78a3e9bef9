"""Build the training sequences: documents are tokenised, split, packed and saved, and every token
is accounted for."""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from stages.run.disk import disk_guard
from stages.run.errors import InputError
from stages.text.accounting import Accounting, SplitAccount
from stages.text.conversation import Conversation, is_empty, until_last_answer
from stages.text.documents import Documents, Encoded, encode, held_out, smallest_digests
from stages.text.examples import Example
from stages.text.packing import Packing, best_fit, concat
from stages.text.pieces import ROLES
from stages.text.prompt import PromptFormat
from stages.text.repeats import Repeats
from stages.text.sequences import bytes_of, save_sequences
from stages.text.tokens import TextTokenizer

BINS = 40  # of the histogram of lengths, at most
_BATCHES_AT_ONCE = 2  # batches that are tokenised in parallel


@dataclass(frozen=True)
class Layout:
    """How documents become sequences.

    `max_length`: tokens of a sequence. `packing`: best_fit cuts no document that fits a sequence;
    concat joins all and cuts at max_length. `overlong`: what best_fit does with a document longer
    than a sequence: truncate (its end, with EOS, is cut off), drop, or error; concat always cuts
    documents. `loss_on`: all tokens, or response: those of answers and what ends them.
    """

    max_length: int
    packing: str = "best_fit"
    overlong: str = "truncate"
    loss_on: str = "all"


@contextmanager
def _without_collector() -> Iterator[None]:
    """The collector of cycles would go through the ids of every batch, several times: a seventh of
    the time. There is no cycle in them."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_without_collector()
def build(
    batches: Iterable[list[Example]],
    tokenizer: TextTokenizer,
    format: PromptFormat,
    *,
    output: Path,
    layout: Layout,
    validation_fraction: float = 0.0,
    seed: int = 0,
    repeats: Repeats | None = None,
) -> Accounting:
    """Write `output`/train and, when documents are held out, `output`/validation;
    `datasets.load_from_disk` reads both.

    Documents are held out before packing, by their text and `seed`. Examples with an empty
    message are left out. Memory grows only by some 200 bytes per document. `repeats` compares the
    documents, and keeps 72 bytes of each of the first million. Raises
    InputError for examples that cannot be used and when no document remains to train on.
    """
    output.mkdir(parents=True, exist_ok=True)
    account = Accounting(layout.max_length)
    documents = Documents(output)
    try:
        smallest = _tokenise(batches, tokenizer, format, seed, documents, account, repeats)
        kept = _fit(documents, layout, account)
        for_validation = held_out(documents.digests[kept], validation_fraction)
        if repeats:
            account.repeated = asdict(repeats.compare(documents.digests, kept, for_validation))
        chosen_digests = {*documents.digests[kept[for_validation]].tolist()}
        account.held_out = [smallest[one] for one in sorted(smallest) if one in chosen_digests]
        chosen = {"train": kept[~for_validation], "validation": kept[for_validation]}
        packings = {
            split: _pack(split, documents.lengths[numbers], layout)
            for split, numbers in chosen.items()
            if len(numbers)
        }
        with disk_guard(
            "the sequences",
            output,
            sum(bytes_of(packing, layout.max_length) for packing in packings.values()),
        ):
            saved = {
                split: _save(split, packing, chosen[split], documents, tokenizer, layout, output)
                for split, packing in packings.items()
            }
        account.train, account.validation = (
            saved["train"],
            saved.get("validation", account.validation),
        )
    finally:
        documents.close()
    account.check()
    return account


def _tokenise(
    batches: Iterable[list[Example]],
    tokenizer: TextTokenizer,
    format: PromptFormat,
    seed: int,
    documents: Documents,
    account: Accounting,
    repeats: Repeats | None,
) -> dict[int, Conversation]:
    """Fill `documents`; return the conversations that would be held out first, by digest. The
    sample is the text with the greatest digest: in effect a random one, and the last that would be
    held out."""
    greatest, roles = -1, np.zeros(len(ROLES), np.int64)
    smallest: dict[int, Conversation] = {}
    for encoded in _encoding(_nonempty(batches, account), tokenizer, format, seed):
        if (digest := int(encoded.digests.max())) > greatest:
            greatest, account.sample = digest, encoded.sample
        account.split_again += encoded.split_again
        account.per_answer += encoded.per_answer
        roles += encoded.roles
        smallest = smallest_digests(smallest | encoded.smallest)
        documents.append(encoded)
        if repeats:
            repeats.add(encoded)
    documents.close_input()
    distinct = len(np.unique(documents.digests))
    account.duplicate = len(documents.digests) - account.per_answer - distinct
    account.tokens_in = int(documents.lengths.sum())
    account.lengths = _histogram(documents.lengths)
    account.roles = dict(zip(ROLES, roles.tolist(), strict=True))
    if not len(documents.lengths):
        raise InputError(
            f"None of the {account.rows_in:,} examples has both an instruction and a response."
        )
    return smallest


def _histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """How many documents have how many tokens: `counts` of them from one of `edges` up to the next.
    The longest hundredth is in the last bin, which would leave the others no room."""
    if not len(lengths):
        return {}
    usual = int(np.quantile(lengths, 0.99)) + 1
    width = -(-usual // BINS)
    edges = [width * n for n in range(-(-usual // width) + 1)]
    counts, _ = np.histogram(np.minimum(lengths, edges[-1]), edges)
    return {"edges": edges, "counts": counts.tolist(), "longest": [int(lengths.max())]}


def _nonempty(batches: Iterable[list[Example]], account: Accounting) -> Iterator[list[Example]]:
    """The batches without their empty examples, and without messages after the last answer; both
    are counted."""
    for batch in batches:
        nonempty = []
        for place, messages in batch:
            answered = until_last_answer(messages)
            if not is_empty(answered):
                nonempty.append(Example(place, answered))
                account.unanswered += len(messages) - len(answered)
        account.rows_in += len(batch)
        account.empty += len(batch) - len(nonempty)
        if nonempty:
            yield nonempty


def _encoding(
    batches: Iterable[list[Example]], tokenizer: TextTokenizer, format: PromptFormat, seed: int
) -> Iterator[Encoded]:
    """The documents of each batch, two batches at a time.

    The tokenizer releases the interpreter's lock, so reading and collecting overlap with it.
    """
    # Without this, tokenizers warns and uses one thread in a forked process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    pending: deque[Future[Encoded]] = deque()
    with ThreadPoolExecutor(_BATCHES_AT_ONCE) as pool:
        for batch in batches:
            pending.append(pool.submit(encode, batch, tokenizer, format, seed))
            if len(pending) > _BATCHES_AT_ONCE:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def _fit(documents: Documents, layout: Layout, account: Accounting) -> np.ndarray:
    """Numbers of the documents that are kept, int64; best_fit's are cut to a sequence's length."""
    limit, lengths = layout.max_length, documents.lengths
    over = lengths > limit
    account.over_long = int(over.sum())
    if layout.packing == "concat" or not over.any():
        return np.arange(len(lengths))
    longest = (
        f"{account.over_long:,} of {len(lengths):,} documents are longer than "
        f"MAX_LENGTH={limit:,}, the longest {lengths.max():,} tokens"
    )
    if layout.overlong == "error":
        raise InputError(f"{longest}. Raise MAX_LENGTH, or set OVERLONG to truncate or drop.")
    dropped = over.copy()
    if layout.overlong == "truncate":
        # A document that is cut within its prompt has no supervised token.
        dropped &= (documents.prompt_lengths >= limit) if layout.loss_on == "response" else False
    account.dropped, account.dropped_tokens = int(dropped.sum()), int(lengths[dropped].sum())
    account.cut_tokens = int((lengths - limit)[over & ~dropped].sum())
    if dropped.all():
        raise InputError(f"{longest}, and no document remains. Raise MAX_LENGTH.")
    documents.lengths = np.minimum(lengths, limit)
    return np.flatnonzero(~dropped)


def _pack(split: str, lengths: np.ndarray, layout: Layout) -> Packing:
    """Pack documents of these lengths; raises InputError where they do not fill one sequence."""
    packing = (concat if layout.packing == "concat" else best_fit)(lengths, layout.max_length)
    if not len(packing):
        remedy = "Lower MAX_LENGTH or set PACKING=best_fit, which pads" + (
            ", or VALIDATION_FRACTION=0" if split == "validation" else ""
        )
        raise InputError(
            f"The {len(lengths):,} documents for {split} have {int(lengths.sum()):,} tokens, "
            f"fewer than one sequence of {layout.max_length:,}. {remedy}."
        )
    return packing


def _save(
    split: str,
    packing: Packing,
    chosen: np.ndarray,
    documents: Documents,
    tokenizer: TextTokenizer,
    layout: Layout,
    output: Path,
) -> SplitAccount:
    """Write the packed documents `chosen`."""
    account = save_sequences(
        output / split,
        split,
        packing,
        documents,
        chosen,
        layout.max_length,
        tokenizer.pad,
        layout.loss_on,
    )
    account.documents, account.documents_tokens = len(chosen), int(documents.lengths[chosen].sum())
    account.left_over = (
        (account.documents_tokens - len(packing) * layout.max_length)
        if layout.packing == "concat"
        else 0
    )
    return account
