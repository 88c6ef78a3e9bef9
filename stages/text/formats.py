"""What a file's records are, and the reader of those in JSON: lines, an array, or objects that take
several lines each. `csv_format` and `tables` read the other formats.

Each reader yields (number, record): the 1-based line (JSON lines, CSV) or row where the record
begins, and either its columns or the `Problem` why there are none. Memory does not grow with the
file.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from stages.run.errors import InputError

# No instruction with its answer is longer. Without a limit, a file without line ends or with 100 MB
# in one example would fill the memory.
MAX_EXAMPLE_BYTES = 16 * 2**20
# Endings of the names of datasets' files; text may be packed with gzip.
_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
FORMATS = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), ".parquet")
FORMAT_NAMES = f"{', '.join(_TEXT)} (each also with .gz) or .parquet"
CHUNK = 2**20  # bytes read at once
AS_UTF8 = "Save the file as UTF-8, as `iconv -f cp1252 -t utf-8` does for Windows-1252."
_ONE_PER_LINE = "A .json or .jsonl file holds one JSON object per line, or one array of objects."


class Problem(str):
    """Why a place in a file has no record. The text follows the place's name in a message."""

    __slots__ = ()


Record = dict[str, Any] | Problem
TOO_LONG = Problem(
    f"holds more than {MAX_EXAMPLE_BYTES // 2**20} MiB in one example. Split it, or remove it."
)


def json_records(
    file: io.BufferedReader, wanted: Collection[str]
) -> tuple[str, Iterator[tuple[int, Record]], list[str]]:
    """What the records' numbers count (line or row), the records of a JSON text in UTF-8, and notes
    on how it is read.

    Its beginning shows which of four it is: objects one per line, an array of objects, such an
    array within an object (among `wanted` are columns of its rows), or objects over several lines.
    """
    head = file.peek(CHUNK)[:CHUNK].decode("utf-8-sig", errors="ignore")
    if head.lstrip()[:1] == "[":
        return "row", json_array(file), []
    if _by_columns(head, wanted):
        raise InputError(
            "this is a table by columns, as pandas' to_json writes it. Write one by rows: "
            'to_json(FILE, orient="records", lines=True).'
        )
    if wrapper := _wrapped_array(head, wanted):
        key, at = wrapper
        return "row", json_array(file, at), [f"read the array of its key {key!r}, and nothing else"]
    first_line, line_end, _ = head.partition("\n")
    if line_end and first_line.rstrip().endswith(("{", "[", ",")):
        return "row", json_objects(file), []
    return "line", json_lines(file), []


def _by_columns(head: str, wanted: Collection[str]) -> bool:
    first = re.match(r'\s*\{\s*"([^"\\]*)"\s*:\s*\{\s*"0"\s*:', head)
    return first is not None and first[1] in wanted


def _wrapped_array(head: str, wanted: Collection[str]) -> tuple[str, int] | None:
    """The key of a JSON object whose value is an array of rows with `wanted` columns, and where in
    `head`, the beginning of the text, the array begins."""

    def after_blanks(at: int) -> int:
        return _blanks(head, at).end()  # type: ignore[union-attr]  # matches the empty text too

    try:
        at, mark = after_blanks(0), "{"
        while head[at] == mark:
            key, at = _scan(head, after_blanks(at + 1))
            at = after_blanks(at)
            if key in wanted or head[at] != ":":
                return None
            begin = after_blanks(at + 1)
            if head[begin] == "[":
                first = _scan(head, after_blanks(begin + 1))[0]
                if isinstance(first, dict) and any(name in first for name in wanted):
                    return key, begin
            at, mark = after_blanks(_scan(head, begin)[1]), ","
    except (ValueError, IndexError, TypeError, RecursionError):
        pass
    return None


def json_lines(file: BinaryIO) -> Iterator[tuple[int, Record]]:
    """Objects, one per line; blank lines are skipped. UTF-8, with or without BOM."""
    for number, line in lines_of(file):
        if isinstance(line, Problem):
            yield number, line
        elif line and not line.isspace():
            try:
                yield number, _object(json.loads(line))
            except (ValueError, RecursionError) as error:
                yield number, Problem(f"is not JSON ({_reason(error)}). {_ONE_PER_LINE}")


def _in_windows_1252(byte: int) -> str:
    character = bytes([byte]).decode("cp1252", errors="ignore")
    return f" ({character!r} in Windows-1252)" if character.isprintable() and character else ""


def lines_of(file: BinaryIO) -> Iterator[tuple[int, str | Problem]]:
    """Numbered lines as text, without the BOM; reads at most MAX_EXAMPLE_BYTES of one at once."""
    number = 0
    while line := file.readline(MAX_EXAMPLE_BYTES + 1):
        number += 1
        if len(line) > MAX_EXAMPLE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(CHUNK)
            yield number, TOO_LONG
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            yield (
                number,
                Problem(
                    f"is not UTF-8: byte {error.start + 1} of the line is 0x{byte:02x}"
                    f"{_in_windows_1252(byte)}. {AS_UTF8}"
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
        chunk = self._file.read(max(CHUNK, len(self.text) - self.at))
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


def json_array(file: BinaryIO, begin: int = 0) -> Iterator[tuple[int, Record]]:
    """Objects of one array, decoded one at a time. UTF-8, with or without BOM.

    `begin`: characters before the array, which is then the value of a key; what follows it is not
    read. Ends after the first error, because nothing after it is certain.
    """
    window = _Window(file)
    return _until_undecodable(_array_items(window, begin))


def json_objects(file: BinaryIO) -> Iterator[tuple[int, Record]]:
    """Objects one after another, with or without line ends in and between them. UTF-8, with or
    without BOM. Ends after the first error."""
    window = _Window(file)

    def items() -> Iterator[tuple[int, Record]]:
        number = 0
        while window.next_mark():
            number += 1
            item = _item(window)
            yield number, item
            if isinstance(item, Problem):
                return

    return _until_undecodable(items())


def _array_items(window: _Window, begin: int) -> Iterator[tuple[int, Record]]:
    number = 0
    while len(window.text) < begin and window.more():
        pass
    window.at = begin
    window.next_mark()
    window.at += 1  # the opening bracket
    while (mark := window.next_mark()) != "]":
        if number:
            if mark != ",":
                wrong = f"is followed by {mark!r} where a comma or the array's end must be."
                yield number, Problem(wrong if mark else _UNCLOSED)
                return
            window.at += 1
        number += 1
        item = _item(window)
        yield number, item
        if isinstance(item, Problem):
            return
    window.at += 1
    if not begin and (mark := window.next_mark()):
        wrong = f"is followed by {mark!r} after the array's end. {_ONE_PER_LINE}"
        yield max(number, 1), Problem(wrong)


def _until_undecodable(records: Iterator[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
    number = 0
    try:
        for number, record in records:
            yield number, record
    except UnicodeDecodeError as error:
        wrong = f"is not UTF-8: byte 0x{error.object[error.start]:02x} at or after it. {AS_UTF8}"
        yield number + 1, Problem(wrong)


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
