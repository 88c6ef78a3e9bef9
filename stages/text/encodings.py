"""Text files as people have them: packed with gzip, in UTF-16, with the line ends of old Macs.

They become a stream of UTF-8 with line feeds, whose readers need not know.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from stages.run.errors import InputError
from stages.text.formats import CHUNK

_GZIP = b"\x1f\x8b"
_NO_TEXT = {
    b"PK\3\4": "a zip archive or an Excel workbook. Unpack it, or save it as CSV",
    b"PAR1": "a Parquet file. Let its name end in .parquet",
    b"\x28\xb5\x2f\xfd": "packed with zstd. Unpack it first",
    b"\xfd7zXZ": "packed with xz. Unpack it first",
}


class _Stream(io.RawIOBase):
    """Chunks of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def open_text(file: io.BufferedReader) -> tuple[io.BufferedReader, list[str]]:
    """`file` as UTF-8 with line feeds, and notes on what was done to it. Reading raises OSError
    where it is damaged; memory does not grow with what it unpacks to.

    Raises InputError for what its first bytes show to be no text.
    """
    notes = []
    file = io.BufferedReader(file, CHUNK)  # how much `peek` shows
    if file.peek(2).startswith(_GZIP):
        file = _buffered(_unpacked(file))
    head = file.peek(CHUNK)
    for magic, what in _NO_TEXT.items():
        if head.startswith(magic):
            raise InputError(f"this is no text but {what}.")
    if encoding := _utf_16_or_32(head):
        notes.append(f"its encoding is {encoding.upper()}")
        file = _buffered(_recoded(file, encoding))
        head = file.peek(CHUNK)
    if b"\r" in head[:-1] and b"\n" not in head:
        notes.append("its lines end in a carriage return, as on old Macs")
        file = _buffered(_with_line_feeds(file))
    return file, notes


def _buffered(chunks: Iterator[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Stream(chunks), CHUNK)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def _unpacked(file: BinaryIO) -> Iterator[bytes]:
    try:
        yield from _chunks(gzip.GzipFile(fileobj=file))  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise OSError(f"its packed content is cut off or damaged ({error})") from None


def _utf_16_or_32(head: bytes) -> str:
    """The encoding that a byte order mark names, or NUL bytes beside ASCII show; "" for others."""
    for mark, encoding in (
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if head.startswith(mark):
            return encoding
    zeros = [byte == 0 for byte in head[:4]]
    if zeros == [False, True, False, True]:
        return "utf-16-le"
    return "utf-16-be" if zeros == [True, False, True, False] else ""


def _recoded(file: BinaryIO, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in _chunks(file):
            yield decoder.decode(chunk).encode()
        yield decoder.decode(b"", final=True).encode()
    except UnicodeError as error:
        reason = getattr(error, "reason", error)
        raise OSError(f"it is not {encoding.upper()} throughout ({reason})") from None


def _with_line_feeds(file: BinaryIO) -> Iterator[bytes]:
    return (chunk.replace(b"\r", b"\n") for chunk in _chunks(file))
