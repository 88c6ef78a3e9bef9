"""Examples of a dataset in any format: instruction, context and response as checked text.

`read_examples` opens what DATASET names (a local file, a folder of files, a saved `datasets`
folder, one of them on S3, or a dataset on the Hub) and yields batches of examples; only one batch
is in memory. Problems are reported together, by file, line or row, and column. Only the standard
library is imported unless the dataset needs more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from stages.model.location import local_path
from stages.run.errors import InputError
from stages.run.layout import SEQUENCE_COLUMNS
from stages.run.progress import printable
from stages.text import formats
from stages.text.formats import FORMAT_NAMES, FORMATS, Problem, Record
from stages.text.sources import Source, open_local

BATCH_EXAMPLES = 1000
# A batch of long examples ends earlier: tokenising takes some hundred bytes per character.
BATCH_CHARACTERS = 4 * 2**20
PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class Columns:
    """Names of a dataset's columns. `context` and `response` are "" where the dataset has none."""

    instruction: str = "instruction"
    context: str = "context"
    response: str = "response"


class Example(NamedTuple):
    """The texts of one example, and its `place` for messages ("dolly.jsonl, line 3").

    A null or absent context is "".
    """

    place: str
    instruction: str
    context: str
    response: str


def read_examples(
    dataset: str,
    *,
    revision: str = "",
    config: str = "",
    split: str = "train",
    columns: Columns | None = None,
) -> Iterator[list[Example]]:
    """Batches of at most 1,000 examples of `dataset`.

    `dataset`: a file of FORMATS, a folder of such files or a saved `datasets` folder, local or
    s3://, or a Hub id with `revision`, `config` and `split` (folders have a split too). Prints what
    is found out about its format. Blank lines are skipped; columns that are not named are ignored.
    Raises InputError: at once for a dataset that
    cannot be opened or lacks a column; at the end for bad examples, of which it names the first
    ten and counts all (nothing is yielded after the first); and for a dataset without examples.
    """
    columns = columns or Columns()
    source = open_dataset(
        dataset,
        revision,
        config,
        split,
        [name for name in (columns.instruction, columns.context, columns.response) if name],
    )
    if config and (dataset.startswith("s3://") or os.path.lexists(dataset)):
        print(f"DATASET_CONFIG={printable(config)}: not read, because only the Hub has them")
    for note in source.notes:
        print(f"DATASET={printable(dataset)}: {printable(note)}", flush=True)
    if source.columns is not None:
        _require(
            source.name,
            source.columns,
            columns.instruction,
            columns.response,
            context=columns.context,
        )
    return _batches(source, columns)


def _batches(source: Source, columns: Columns) -> Iterator[list[Example]]:
    batch: list[Example] = []
    problems: list[str] = []
    examples = bad = characters = 0
    context_seen = not columns.context
    for place, record in source.read():
        if not examples and source.columns is None and isinstance(record, dict):
            _require(place, list(record), columns.instruction, columns.response)
        examples += 1
        example = _example(place, record, columns)
        if isinstance(example, list):
            bad += 1
            problems += example[: PROBLEMS_SHOWN - len(problems)]
        elif not bad:
            batch.append(example)
            characters += len(example.instruction) + len(example.context) + len(example.response)
            context_seen = context_seen or columns.context in record
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
        raise InputError(
            f"{source.name} has no examples. Check that DATASET names the right file or split."
        )
    if not context_seen:
        raise InputError(
            f"{source.name}: no example has the column {columns.context!r}. Set CONTEXT_COLUMN "
            "to its name, or to nothing if there is none."
        )
    if batch:
        yield batch


def _require(
    place: str, existing: list[str], instruction: str, response: str, context: str = ""
) -> None:
    """Raise InputError with each missing column, the closest name, and the existing columns."""
    if set(SEQUENCE_COLUMNS) <= set(existing) and instruction not in existing:
        raise InputError(
            f"{place} holds packed sequences, which a data stage published, and no examples. Set "
            "DATASET to what it was made from."
        )
    problems = []
    for setting, name in (
        ("INSTRUCTION_COLUMN", instruction),
        ("CONTEXT_COLUMN", context),
        ("RESPONSE_COLUMN", response),
    ):
        if name and name not in existing:
            near = get_close_matches(name, existing, n=1)
            hint = f" Did you mean {near[0][:60]!r}?" if near else ""
            have = (
                f"it has {', '.join(repr(column[:60]) for column in existing[:20])}"
                if existing
                else "it has no columns"
            )
            none = ", or to nothing if there is none" if name == context else ""
            problems.append(
                f"{place}: there is no column {name!r}; {have}.{hint} Set {setting} to its "
                f"name{none}."
            )
        elif name and existing.count(name) > 1:
            problems.append(
                f"{place}: {existing.count(name)} columns are called {name!r}. Rename all but one."
            )
    if problems:
        raise InputError(problems)


def _example(place: str, record: Record, columns: Columns) -> Example | list[str]:
    """The record as an example, or its problems."""
    if isinstance(record, Problem):
        return [f"{place} {record}"]
    texts: list[str] = []
    problems = []
    for name, required in (
        (columns.instruction, True),
        (columns.context, False),
        (columns.response, bool(columns.response)),
    ):
        text: Any = record.get(name) if name else ""
        if not required and (text is None or text != text):  # null, or pandas' NaN
            text = ""
        problem = fault(text, name in record)
        if problem:
            problems.append(f"{place}, column {name!r} {problem}")
        texts.append(text)
    if not problems and sum(map(len, texts)) > formats.MAX_EXAMPLE_BYTES:
        problems.append(f"{place} {formats.TOO_LONG}")
    return problems or Example(place, *texts)


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
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = (
            f"character {error.start + 1} is U+{ord(text[error.start]):04X}, half of a "
            "surrogate pair"
        )
        return f"is not text: {half}. Write the character itself."
    return ""


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
