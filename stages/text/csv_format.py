"""Read the records of a CSV file: its beginning shows the separator and how quotes are escaped."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from stages.run.errors import InputError
from stages.text.formats import CHUNK, MAX_EXAMPLE_BYTES, TOO_LONG, Problem, Record, lines_of

_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}


def csv_records(
    file: io.BufferedReader, wanted: Collection[str], separator: str = ","
) -> tuple[list[str], Iterator[tuple[int, Record]], list[str]]:
    """The header of a file in UTF-8, its records, and notes on how it is read.

    RFC 4180: quotes are doubled, and line ends allowed within them. Another separator than
    `separator` is used where Excel's first line `sep=;` names it, or where only that finds the
    `wanted` columns in the header. A backslash before a quote escapes it where the beginning cannot
    be read otherwise.
    """
    csv.field_size_limit(MAX_EXAMPLE_BYTES)
    head = file.peek(CHUNK)[:CHUNK].decode("utf-8-sig", errors="ignore")
    lines, notes, skipped = _CsvLines(file), [], 0
    first = head.split("\n", 1)[0].strip("\r")
    if first.lower().startswith("sep=") and first[4:5].strip(" "):
        found, skipped = first[4], 1
        head = head.partition("\n")[2]
    else:
        found = _separator(first, wanted, separator)
    options: dict[str, Any] = {"delimiter": found, "strict": True}
    if found != separator:
        notes.append(f"its columns are separated by a {_SEPARATORS.get(found, repr(found))}")
    if _escapes(head, options):
        options["escapechar"] = "\\"
        notes.append('a backslash escapes the next character, as in \\"')
    try:
        for _ in range(skipped):
            next(lines)
        reader = csv.reader(lines, **options)
        header = next(reader, [])
    except (csv.Error, _BadLine) as error:
        raise InputError(f"line {1 + skipped}: {error}") from None
    return header, _csv_rows(lines, reader, header, skipped), notes


def _separator(first: str, wanted: Collection[str], usual: str) -> str:
    """What separates the columns in the line `first`: the separator that gives the most `wanted`
    columns, the usual one unless another gives more. Where none gives any, the usual one, unless it
    leaves the line whole."""
    columns = {}
    for separator in dict.fromkeys([usual, *_SEPARATORS]):
        try:
            columns[separator] = next(csv.reader([first], delimiter=separator), [])
        except csv.Error:
            columns[separator] = []
    best = max(columns, key=lambda one: len(set(wanted) & set(columns[one])))
    if set(wanted) & set(columns[best]) or len(columns[usual]) > 1:
        return best
    return max(columns, key=lambda one: len(columns[one]))


def _escapes(head: str, options: dict[str, Any]) -> bool:
    """Whether the first lines are CSV only if a backslash escapes a quote."""
    if '\\"' not in head:
        return False
    lines = [f"{line}\n" for line in head.split("\n")[:-1]]

    def readable(**more: Any) -> bool:
        try:
            for _ in csv.reader(lines, **options, **more):
                pass
        except csv.Error as error:
            return "end of data" in str(error)  # `head` ends within a record
        return True

    return not readable() and readable(escapechar="\\")


def _csv_rows(
    lines: _CsvLines, reader: Any, header: list[str], skipped: int
) -> Iterator[tuple[int, Record]]:
    """`skipped`: lines before those that the reader counts."""
    while True:
        lines.room = MAX_EXAMPLE_BYTES
        number = skipped + reader.line_num + 1
        try:
            fields = next(reader, None)
        except _BadLine as error:
            yield skipped + reader.line_num + 1, Problem(error)
            return
        except csv.Error as error:
            yield number, Problem(f"is not CSV ({error}). Check its quotes and separators.")
            return
        if fields is None:
            return
        if not fields:
            continue  # a blank line
        if len(fields) != len(header):
            counts = f"has {len(fields)} fields where the header has {len(header)}"
            yield number, Problem(f"{counts}. Check its quotes and separators.")
        else:
            yield number, dict(zip(header, fields, strict=True))


class _BadLine(ValueError):
    """A line that is not text or too long; it passes through csv.reader."""


class _CsvLines:
    """Lines for csv.reader. `room`: characters that the record may still take; within quotes it
    continues over lines."""

    def __init__(self, file: BinaryIO):
        self._lines, self.room = lines_of(file), MAX_EXAMPLE_BYTES

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        _, line = next(self._lines)
        self.room -= len(line)
        if "\0" in line:
            line = Problem("holds a NUL character, so it is damaged or no text. Remove it.")
        if isinstance(line, Problem) or self.room < 0:
            raise _BadLine(line if isinstance(line, Problem) else TOO_LONG)
        return line
