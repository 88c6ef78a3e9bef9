"""Examples of a dataset in any format, as checked conversations.

`open_examples` opens what DATASET names (a local file, a folder of files, a saved `datasets`
folder, one of them on S3, or a dataset on the Hub), finds its columns and yields batches of
examples; only one batch is in memory. Problems are reported together, by file, line or row, and
column. Only the standard library is imported unless the dataset needs more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

from stages.model.location import local_path
from stages.run.errors import InputError
from stages.run.progress import printable
from stages.text import formats
from stages.text.columns import AUTO, USUAL, Columns, find_columns, spellings
from stages.text.conversation import (
    Conversation,
    Message,
    read_conversation,
    text_fault,
)
from stages.text.formats import FORMAT_NAMES, FORMATS, Problem, Record
from stages.text.sources import Source, open_local

BATCH_EXAMPLES = 1000
# A batch of long examples ends earlier: tokenising takes some hundred bytes per character.
BATCH_CHARACTERS = 4 * 2**20
PROBLEMS_SHOWN = 10
# Records that are looked at for a context, which the first may lack.
_LOOKED_AT = 100


class Example(NamedTuple):
    """One example as a conversation, and its `place` for messages ("dolly.jsonl, line 3")."""

    place: str
    messages: Conversation


@dataclass
class Examples:
    """An opened dataset. `columns` are those that are read, none of them AUTO; `unread`: names of
    others, and of keys of messages, complete once `batches` has ended; `read_as`: lines that say
    how it is read; `setting`: the one that named it."""

    columns: Columns
    batches: Iterator[list[Example]]
    unread: set[str]
    read_as: tuple[str, ...]
    setting: str

    def notes(self) -> list[str]:
        """What is not read, once `batches` has ended."""
        names = sorted(self.unread)
        if not names:
            return []
        more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
        return [f"not read of {self.setting}: {', '.join(map(repr, names[:10]))}{more}."]


def open_examples(
    dataset: str,
    *,
    revision: str = "",
    config: str = "",
    split: str = "train",
    columns: Columns | None = None,
    most: int = 0,
    setting: str = "DATASET",
) -> Examples:
    """The examples of `dataset`, in batches of at most 1,000; only the first `most`, if not 0.

    `dataset`: a file of FORMATS, a folder of such files or a saved `datasets` folder, local or
    s3://, or a Hub id with `revision`, `config` and `split` (folders have a split too). `setting`
    named it. Blank lines are skipped; columns that are not named are ignored.
    Raises InputError: at once for a dataset that cannot be opened, has no examples or lacks a
    column; at the end for bad examples, of which it names the first ten and counts all (nothing is
    yielded after the first).
    """
    columns = columns or Columns()
    source = open_dataset(dataset, revision, config, split, sorted(columns.wanted))
    lines = [*source.notes]
    records = islice(source.read(), most or None)
    if most:
        lines.append(f"only the first {most:,} examples")
    first = list(islice(records, _LOOKED_AT)) if source.columns is None else []
    place, existing = _existing(source, first, columns)
    late = set[str]()
    if existing is None:  # no record can be read: the batches report it
        found = Columns("", "", "", "")
    else:
        found = find_columns(place, existing, columns)
        lines.append(found.describe())
        if columns.context == AUTO and found.instruction and not found.context:
            late = {*spellings(USUAL["context"])}
    unread = {str(name) for name in source.columns or ()} - {*found.named}
    batches = _batches(source.name, chain(first, records), found, unread, late)
    read_as = [f"{setting}={printable(dataset)}: {printable(line)}" for line in lines]
    if config and (dataset.startswith("s3://") or os.path.lexists(dataset)):
        read_as.append(
            f"DATASET_CONFIG={printable(config)}: not read, because only the Hub has them"
        )
    return Examples(found, batches, unread, tuple(read_as), setting)


def _existing(
    source: Source, first: list[tuple[str, Record]], columns: Columns
) -> tuple[str, list[str] | None]:
    """The names of the columns, and the place that shows them: the dataset, or its first record."""
    if source.columns is not None:
        return source.name, source.columns
    if not first:
        raise _no_examples(source.name)
    place, record = first[0]
    if isinstance(record, Problem):
        return place, None
    records = (later for _, later in first if not isinstance(later, Problem))
    names = {*spellings(USUAL["context"])} if columns.context == AUTO else {columns.context} - {""}
    if columns.context == AUTO:
        names &= {name for later in records for name in later}
    return place, [*record, *sorted(names - {*record})]


def _no_examples(name: str) -> InputError:
    return InputError(f"{name} has no examples. Name another file or split.")


def _batches(
    name: str,
    records: Iterator[tuple[str, Record]],
    columns: Columns,
    unread: set[str],
    late: set[str],
) -> Iterator[list[Example]]:
    """`late`: names of columns that would be the context, had the first records had one."""
    context_seen = not columns.context
    batch: list[Example] = []
    problems: list[str] = []
    examples = bad = characters = 0
    for place, record in records:
        examples += 1
        context_seen = context_seen or columns.context in record
        example = _example(place, record, columns, unread)
        if isinstance(example, list):
            bad += 1
            problems += example[: PROBLEMS_SHOWN - len(problems)]
        elif not bad:
            batch.append(example)
            characters += sum(len(one.content) + len(one.context) for one in example.messages)
            if len(batch) == BATCH_EXAMPLES or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if bad > 1:
        problems.append(
            f"{bad:,} of {examples:,} examples have problems"
            + (f"; above are the first {len(problems)}." if bad > len(problems) else ".")
        )
    if problems:
        raise InputError(problems)
    if not examples:
        raise _no_examples(name)
    if not context_seen:
        raise InputError(
            f"{name}: no example has the column {columns.context!r}. Set CONTEXT_COLUMN to its "
            "name, or to nothing if there is none."
        )
    if missed := sorted(late & unread):
        raise InputError(
            f"{name}: the column {missed[0]!r} first comes after {_LOOKED_AT} examples, and may be "
            "the context. Set CONTEXT_COLUMN to it, or to nothing."
        )
    if batch:
        yield batch


def _example(place: str, record: Record, columns: Columns, unread: set[str]) -> Example | list[str]:
    """The record as an example, or its problems."""
    if isinstance(record, Problem):
        return [f"{place} {record}"]
    unread |= record.keys() - {*columns.named}
    if columns.messages:
        name = columns.messages
        value, present = record.get(name), name in record
        if value is None:
            return [f"{place}, column {name!r} {fault(value, present)}"]
        messages = read_conversation(value, unread)
        if isinstance(messages, str):
            return [f"{place}, column {name!r} {messages}"]
    else:
        texts, problems = _texts(place, record, columns)
        if problems:
            return problems
        instruction, context, response = texts
        asked = (Message("user", instruction, context),) if columns.instruction else ()
        messages = (*asked, Message("assistant", response))
    if sum(len(one.content) + len(one.context) for one in messages) > formats.MAX_EXAMPLE_BYTES:
        return [f"{place} {formats.TOO_LONG}"]
    return Example(place, messages)


def _texts(place: str, record: dict[str, Any], columns: Columns) -> tuple[list[str], list[str]]:
    """Instruction, context and response of a record, and their problems."""
    texts: list[str] = []
    problems = []
    for name, required in (
        (columns.instruction, True),
        (columns.context, False),
        (columns.response, True),
    ):
        text: Any = record.get(name) if name else ""
        if not required and (text is None or text != text):  # null, or pandas' NaN
            text = ""
        if problem := fault(text, name in record):
            problems.append(f"{place}, column {name!r} {problem}")
        texts.append(text)
    return texts, problems


def fault(text: object, present: bool) -> str:
    """The problem of a column's value, "" if there is none."""
    if text is None:
        return "is null: every example needs a text here." if present else "is missing."
    if not isinstance(text, str):
        shown = repr(text)
        return (
            f"is {shown if len(shown) <= 40 else shown[:40] + '...'}, of type "
            f"{type(text).__name__}: it must be text."
        )
    return text_fault(text)


def open_dataset(
    dataset: str, revision: str, config: str, split: str, columns: list[str]
) -> Source:
    """Open what DATASET names, local or remote; formats with columns read only `columns`."""
    if dataset.startswith("s3://"):
        from stages.text.remote_sources import open_s3

        return open_s3(dataset, split, columns)
    kind = f"a file ({FORMAT_NAMES}), a folder of files or one made by save_to_disk"
    path = local_path("DATASET", dataset, kind, suffixes=FORMATS)
    if path is not None:
        return open_local(path, split, columns)
    from stages.text.remote_sources import open_hub

    return open_hub(dataset, revision, config, split, columns)
