"""Rows of a dataset, whatever it is kept in: instruction, context and response as checked text.

`read_examples` finds out what DATASET names (a local file, a saved `datasets` folder, the same two
on S3, or a dataset of the Hub) and passes on batches of rows; nothing is ever held but one batch.
What is wrong in the rows is reported together, by file, row and column. Only the standard library
is imported unless the dataset needs more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from stages.model.location import local_path
from stages.run.errors import InputError
from stages.text import formats
from stages.text.formats import Problem, Record
from stages.text.sources import FORMATS, Source, open_local

BATCH_EXAMPLES = 1000
# A batch of long rows ends earlier: tokenising takes some hundred bytes per character.
BATCH_CHARACTERS = 4 * 2**20
PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class Columns:
    """Names of a dataset's columns. `context` and `response` may be "": the dataset then has
    none."""

    instruction: str = "instruction"
    context: str = "context"
    response: str = "response"


class Example(NamedTuple):
    """One row's texts, and its `place` for messages ("dolly.jsonl, line 3"). A null or absent
    context is ""."""

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
    """Batches of at most 1,000 rows of `dataset`.

    `dataset`: .json/.jsonl/.csv/.parquet file or saved `datasets` folder, local or s3://, or a Hub
    id with `revision`, `config` and `split` (a saved folder has a split too). Blank lines are
    skipped; columns that are not named are ignored. Raises InputError: at once for what cannot be
    opened or lacks a column; at the end for bad rows, the first ten of them named and all counted
    (after the first bad row nothing more is yielded); and for a dataset without rows.
    """
    columns = columns or Columns()
    source = open_dataset(
        dataset,
        revision,
        config,
        split,
        [name for name in (columns.instruction, columns.context, columns.response) if name],
    )
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
    rows = bad = characters = 0
    context_seen = not columns.context
    for number, record in _to_the_end(source):
        place = f"{source.name}, {source.unit} {number}"
        if not rows and source.columns is None and isinstance(record, dict):
            _require(place, list(record), columns.instruction, columns.response)
        rows += 1
        row = _row(place, record, columns)
        if isinstance(row, list):
            bad += 1
            problems += row[: PROBLEMS_SHOWN - len(problems)]
        elif not bad:
            batch.append(row)
            characters += len(row.instruction) + len(row.context) + len(row.response)
            context_seen = context_seen or columns.context in record
            if len(batch) == BATCH_EXAMPLES or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if bad > 1:
        problems.append(
            f"{bad:,} of {rows:,} rows have problems"
            + (f"; above are the first {len(problems)}." if bad > len(problems) else ".")
        )
    if problems:
        raise InputError(problems)
    if not rows:
        raise InputError(
            f"{source.name} has no rows. Check that DATASET names the right file or split."
        )
    if not context_seen:
        raise InputError(
            f"{source.name}: no row has the column {columns.context!r}. Set CONTEXT_COLUMN to its "
            "name, or to nothing if there is none."
        )
    if batch:
        yield batch


def _to_the_end(source: Source) -> Iterator[tuple[int, Record]]:
    try:
        yield from source.records
    except OSError as error:
        raise InputError(f"{source.name} cannot be read to its end: {error}.") from None


def _require(
    place: str, there: list[str], instruction: str, response: str, context: str = ""
) -> None:
    """Raise InputError with every named column that does not exist, the nearest that is, and all
    that are."""
    problems = []
    for setting, name in (
        ("INSTRUCTION_COLUMN", instruction),
        ("CONTEXT_COLUMN", context),
        ("RESPONSE_COLUMN", response),
    ):
        if name and name not in there:
            near = get_close_matches(name, there, n=1)
            hint = f" Did you mean {near[0][:60]!r}?" if near else ""
            have = (
                f"it has {', '.join(repr(column[:60]) for column in there[:20])}"
                if there
                else "it has no columns"
            )
            none = ", or to nothing if there is none" if name == context else ""
            problems.append(
                f"{place}: there is no column {name!r}; {have}.{hint} Set {setting} to its "
                f"name{none}."
            )
        elif name and there.count(name) > 1:
            problems.append(
                f"{place}: {there.count(name)} columns are called {name!r}. Rename all but one."
            )
    if problems:
        raise InputError(problems)


def _row(place: str, record: Record, columns: Columns) -> Example | list[str]:
    """The record as a row, or what is wrong with it."""
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
        if text is None and not required:
            text = ""
        problem = fault(text, name in record)
        if problem:
            problems.append(f"{place}, column {name!r} {problem}")
        texts.append(text)
    if not problems and sum(map(len, texts)) > formats.MAX_EXAMPLE_BYTES:
        problems.append(f"{place} {formats.TOO_LONG}")
    return problems or Example(place, *texts)


def fault(text: object, present: bool) -> str:
    """What is wrong with a column's value, "" for free."""
    if text is None:
        return "is null: every row needs a text here." if present else "is missing."
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
    """Open what DATASET names, wherever it is; of formats with columns only `columns` are read."""
    if dataset.startswith("s3://"):
        from stages.text.remote_sources import open_s3

        return open_s3(dataset, split, columns)
    kind = f"a file ({', '.join(FORMATS)}) or a folder made by save_to_disk"
    path = local_path("DATASET", dataset, kind, suffixes=FORMATS)
    if path is not None:
        return open_local(path, split, columns)
    from stages.text.remote_sources import open_hub

    return open_hub(dataset, revision, config, split, columns)
