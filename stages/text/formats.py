"""Read the records of one file: JSON lines, a JSON array, CSV, Parquet or an Arrow stream.

Each reader yields (number, record): the 1-based line (JSON lines, CSV) or row where the record
begins, and either its columns or the `Problem` why there are none. Memory does not grow with the
file. pyarrow is imported only for Parquet and Arrow.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from stages.run.errors import InputError

# No instruction with its answer is longer. Without a limit, a file without line ends or with 100 MB
# in one example would fill the memory.
MAX_EXAMPLE_BYTES = 16 * 2**20
_CHUNK = 2**20
_BATCH_ROWS = 1000
_ONE_PER_LINE = "A .json or .jsonl file holds one JSON object per line, or one array of objects."


class Problem(str):
    """Why a place in a file has no record. The text follows the place's name in a message."""

    __slots__ = ()


Record = dict[str, Any] | Problem
TOO_LONG = Problem(
    f"holds more than {MAX_EXAMPLE_BYTES // 2**20} MiB in one example. Split it, or remove it."
)


def holds_array(file: io.BufferedReader) -> bool:
    """Whether the JSON text in `file` is one array rather than lines. Consumes nothing."""
    return file.peek(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def json_lines(file: BinaryIO) -> Iterator[tuple[int, Record]]:
    """Objects, one per line; blank lines are skipped. UTF-8, with or without BOM."""
    for number, line in _lines(file):
        if isinstance(line, Problem):
            yield number, line
        elif line and not line.isspace():
            try:
                yield number, _object(json.loads(line))
            except (ValueError, RecursionError) as error:
                yield number, Problem(f"is not JSON ({_reason(error)}). {_ONE_PER_LINE}")


def _lines(file: BinaryIO) -> Iterator[tuple[int, str | Problem]]:
    """Numbered lines as text, without the BOM; reads at most MAX_EXAMPLE_BYTES of one at once."""
    number = 0
    while line := file.readline(MAX_EXAMPLE_BYTES + 1):
        number += 1
        if len(line) > MAX_EXAMPLE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(_CHUNK)
            yield number, TOO_LONG
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield (
                number,
                Problem(
                    f"is not UTF-8: byte {error.start + 1} of the line is "
                    f"0x{line[error.start]:02x}. Save the file as UTF-8."
                ),
            )


def _object(value: object) -> Record:
    if isinstance(value, dict):
        return value
    return Problem(f"is not a JSON object but a {type(value).__name__}. {_ONE_PER_LINE}")


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


class _Window:
    """The part of a JSON array's text that is in memory."""

    def __init__(self, file: BinaryIO):
        self._file, self._decode = file, codecs.getincrementaldecoder("utf-8-sig")().decode
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> bool:
        """Read more and drop the text before `at`; False at the end of the file. Raises
        UnicodeDecodeError."""
        if self.ended:
            return False
        chunk = self._file.read(max(_CHUNK, len(self.text) - self.at))
        self.ended = not chunk
        self.text, self.at = self.text[self.at :] + self._decode(chunk, final=self.ended), 0
        return not self.ended

    def next_mark(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            # The pattern matches the empty text too, so there is always a match.
            self.at = _blanks(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""


def json_array(file: BinaryIO) -> Iterator[tuple[int, Record]]:
    """Objects of one array, decoded one at a time. UTF-8, with or without BOM.

    Ends after the first error, because nothing after it is certain.
    """
    window, number = _Window(file), 0
    try:
        window.next_mark()
        window.at += 1  # the opening bracket
        while (mark := window.next_mark()) != "]":
            if number:
                if mark != ",":
                    yield (
                        number,
                        Problem(
                            f"is followed by {mark!r} where a comma or the array's end must be."
                            if mark
                            else _UNCLOSED
                        ),
                    )
                    return
                window.at += 1
            number += 1
            item = _item(window)
            yield number, item
            if isinstance(item, Problem):
                return
        window.at += 1
        if mark := window.next_mark():
            yield (
                max(number, 1),
                Problem(f"is followed by {mark!r} after the array's end. {_ONE_PER_LINE}"),
            )
    except UnicodeDecodeError as error:
        yield (
            number + 1,
            Problem(
                f"is not UTF-8: byte 0x{error.object[error.start]:02x} at or after it. Save the "
                "file as UTF-8."
            ),
        )


_UNCLOSED = "is the last of an array that is not closed. The file seems to be cut off."
_scan = json.JSONDecoder().raw_decode
_blanks = re.compile(r"\s*").match


def _item(window: _Window) -> Record:
    """Decode the value at the window; read more while the window's end may have cut it off."""
    window.next_mark()
    while True:
        try:
            value, window.at = _scan(window.text, window.at)
            return _object(value)
        except (ValueError, RecursionError) as error:
            if len(window.text) - window.at > MAX_EXAMPLE_BYTES:
                return TOO_LONG
            if isinstance(error, RecursionError) or not window.more():
                return Problem(f"is not JSON ({_reason(error)}). {_ONE_PER_LINE}")


def csv_records(file: BinaryIO) -> tuple[list[str], Iterator[tuple[int, Record]]]:
    """The header and the records of a comma-separated file (RFC 4180: quotes doubled, line ends
    allowed within quotes)."""
    csv.field_size_limit(MAX_EXAMPLE_BYTES)
    lines = _CsvLines(file)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
    except (csv.Error, _BadLine) as error:
        raise InputError(f"line 1: {error}") from None
    return header, _csv_rows(lines, reader, header)


def _csv_rows(lines: _CsvLines, reader: Any, header: list[str]) -> Iterator[tuple[int, Record]]:
    while True:
        lines.room = MAX_EXAMPLE_BYTES
        number = reader.line_num + 1
        try:
            fields = next(reader, None)
        except _BadLine as error:
            yield reader.line_num + 1, Problem(error)
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
        self._lines, self.room = _lines(file), MAX_EXAMPLE_BYTES

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        _, line = next(self._lines)
        self.room -= len(line)
        if isinstance(line, Problem) or self.room < 0:
            raise _BadLine(line if isinstance(line, Problem) else TOO_LONG)
        return line


def parquet_records(
    source: Any, wanted: Iterable[str]
) -> tuple[list[str], Iterator[tuple[int, Record]]]:
    """Column names of a Parquet file (a path or an open file), and its records with the `wanted`
    columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source)
        names = file.schema_arrow.names
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"this is not a Parquet file ({error}).") from None
    columns = [name for name in names if name in set(wanted)]
    return names, table_records(file.iter_batches(batch_size=_BATCH_ROWS, columns=columns), columns)


def arrow_records(
    file: Any, wanted: Iterable[str]
) -> tuple[list[str], Iterator[tuple[int, Record]]]:
    """Column names of an open Arrow stream (a data file of a saved dataset), and its records with
    the `wanted` columns."""
    import pyarrow as pa

    try:
        stream = pa.ipc.open_stream(file)
        names = stream.schema.names
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"this is not an Arrow stream ({error}).") from None
    return names, table_records(stream, [name for name in names if name in set(wanted)])


def table_records(tables: Iterable[Any], columns: list[str]) -> Iterator[tuple[int, Record]]:
    """Records of Arrow tables or record batches with `columns`, numbered from 1."""
    import pyarrow as pa

    number = 0
    try:
        for table in tables:
            selected = table.select(columns)
            # A stream is not checked as it is read: a wrong offset would read other memory.
            selected.validate(full=True)
            for begin in range(0, selected.num_rows, _BATCH_ROWS):
                for record in selected.slice(begin, _BATCH_ROWS).to_pylist():
                    number += 1
                    yield number, record
    except (pa.ArrowException, UnicodeDecodeError, OSError, MemoryError) as error:
        reason = str(error) or "it needs more memory than is available"
        yield (
            number + 1,
            Problem(
                f"or one of the {_BATCH_ROWS} after it cannot be read ({reason}). The file seems "
                "to be damaged."
            ),
        )
