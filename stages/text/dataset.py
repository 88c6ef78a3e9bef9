"""The training rows: documents from text, split, packed and saved, with every token accounted
for."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.run.disk import disk_guard
from stages.run.errors import InputError
from stages.text.accounting import Accounting, SplitAccount
from stages.text.documents import Documents, Encoded, digest, encode, held_out
from stages.text.examples import Example
from stages.text.packing import Packing, best_fit, concat
from stages.text.prompt import PromptTemplate
from stages.text.sequences import bytes_of, save_sequences
from stages.text.tokens import TextTokenizer

_AT_ONCE = 2  # batches that are tokenised next to each other


@dataclass(frozen=True)
class Layout:
    """How documents become rows.

    `max_length`: tokens of a row. `packing`: best_fit cuts no document that fits a row; concat
    joins all and cuts at max_length. `overlong`: what best_fit does with a document longer than a
    row: truncate (its end is cut, with EOS), drop, or error; concat cuts documents in any case.
    `loss_on`: all tokens, or response (and EOS).
    """

    max_length: int
    packing: str = "best_fit"
    overlong: str = "truncate"
    loss_on: str = "all"


def build(
    rows: Iterable[list[Example]],
    tokenizer: TextTokenizer,
    template: PromptTemplate,
    *,
    output: Path,
    layout: Layout,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> Accounting:
    """Write `output`/train and, when documents are held out, `output`/validation; both for
    `datasets.load_from_disk`.

    Documents are held out before packing, by their text and `seed`. Rows with an empty instruction
    or response are left out. Memory grows by some bytes per document only. Raises InputError for
    rows that cannot be used and when nothing is left to train on.
    """
    output.mkdir(parents=True, exist_ok=True)
    account = Accounting(layout.max_length)
    documents = Documents(output)
    try:
        _tokenise(rows, tokenizer, template, seed, documents, account)
        kept = _fit(documents, layout, account)
        for_validation = held_out(documents.digests[kept], validation_fraction)
        chosen = {"train": kept[~for_validation], "validation": kept[for_validation]}
        packings = {
            split: _pack(split, documents.lengths[numbers], layout)
            for split, numbers in chosen.items()
            if len(numbers)
        }
        with disk_guard(
            "the packed rows",
            output,
            sum(bytes_of(packing, layout.max_length) for packing in packings.values()),
        ):
            saved = {
                split: _save(split, packed, chosen[split], documents, tokenizer, layout, output)
                for split, packed in packings.items()
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
    rows: Iterable[list[Example]],
    tokenizer: TextTokenizer,
    template: PromptTemplate,
    seed: int,
    documents: Documents,
    account: Accounting,
) -> None:
    """Fill `documents`. The sample is the text of the greatest digest: as good as drawn at random,
    and never the first held out."""
    greatest = -1
    for batch, encoding in _encoding(_filled(rows, account), tokenizer, template):
        texts = [template.text(row.instruction, row.context, row.response) for row in batch]
        digests = [digest(text, seed) for text in texts]
        if max(digests) > greatest:
            greatest = max(digests)
            account.sample = texts[digests.index(greatest)]
        encoded = encoding.result()
        account.split_again += encoded.split_again
        documents.append(encoded, digests)
    documents.close_input()
    account.duplicate = len(documents.digests) - len(np.unique(documents.digests))
    account.tokens_in = int(documents.lengths.sum())
    if not len(documents.lengths):
        raise InputError(
            f"None of the {account.rows_in:,} rows has both an instruction and a response."
        )


def _filled(rows: Iterable[list[Example]], account: Accounting) -> Iterator[list[Example]]:
    """The batches without their empty rows, which are counted."""
    for batch in rows:
        filled = [row for row in batch if row.instruction.strip() and row.response.strip()]
        account.rows_in += len(batch)
        account.empty += len(batch) - len(filled)
        if filled:
            yield filled


def _encoding(
    batches: Iterable[list[Example]], tokenizer: TextTokenizer, template: PromptTemplate
) -> Iterator[tuple[list[Example], Future[Encoded]]]:
    """Each batch with its documents to come, two batches at a time: the tokenizer runs outside
    Python's lock, so that reading and collecting cost no time next to it."""
    # Without this, tokenizers goes back to one thread, with a warning, in a process that was
    # forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    begun: deque[tuple[list[Example], Future[Encoded]]] = deque()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for batch in batches:
            begun.append((batch, pool.submit(encode, batch, tokenizer, template)))
            if len(begun) > _AT_ONCE:
                yield begun.popleft()
        yield from begun


def _fit(documents: Documents, layout: Layout, account: Accounting) -> np.ndarray:
    """The documents that are kept, int64, each cut to a row's length where best_fit needs that."""
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
    lost = over.copy()
    if layout.overlong == "truncate":
        # A document cut within its prompt has nothing left to learn from.
        lost &= (documents.prompt_lengths >= limit) if layout.loss_on == "response" else False
    account.dropped, account.dropped_tokens = int(lost.sum()), int(lengths[lost].sum())
    account.cut_tokens = int((lengths - limit)[over & ~lost].sum())
    if lost.all():
        raise InputError(f"{longest}, and none is left. Raise MAX_LENGTH.")
    documents.lengths = np.minimum(lengths, limit)
    return np.flatnonzero(~lost)


def _pack(split: str, lengths: np.ndarray, layout: Layout) -> Packing:
    """The rows of documents of these lengths; raises InputError where they are not enough for
    one."""
    packed = (concat if layout.packing == "concat" else best_fit)(lengths, layout.max_length)
    if not len(packed):
        remedy = "Lower MAX_LENGTH or set PACKING=best_fit, which pads" + (
            ", or VALIDATION_FRACTION=0" if split == "validation" else ""
        )
        raise InputError(
            f"The {len(lengths):,} documents for {split} have {int(lengths.sum()):,} tokens, "
            f"less than a row of {layout.max_length:,}. {remedy}."
        )
    return packed


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
