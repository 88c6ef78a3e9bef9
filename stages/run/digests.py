"""Digests of files and folders by content, and a cheap signature that saves reading them again.

Neither a path nor a time decides whether two things are the same; time stamps only decide whether
a file is read again. Standard library only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def file_digest(path: Path, read: Callable[[int], object] = lambda count: None) -> str:
    """SHA-256 of a file's bytes in hexadecimal; `read` is called with each number of bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            read(len(block))
    return digest.hexdigest()


def files_below(path: Path, patterns: tuple[str, ...] = ("*",)) -> Iterator[Path]:
    """The file itself, or a folder's files that match and are not hidden, in a fixed order."""
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden and any(file.match(pattern) for pattern in patterns):
            yield file


def content_digest(path: Path, files: Iterable[Path] | None = None) -> str:
    """One SHA-256 for a file's content, or for the names and contents of a folder's `files`: all
    below it where none are given."""
    files = files_below(path) if files is None else files
    return combine({_name(file, path): file_digest(file) for file in files})


def signature(path: Path, files: Iterable[Path] | None = None) -> str:
    """A digest of sizes, times and inodes of the same files: it changes whenever their content
    does, and sometimes when it does not. Costs a stat per file."""
    lines = []
    for file in files_below(path) if files is None else files:
        s = file.stat()
        lines.append(f"{_name(file, path)} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def combine(digests: dict[str, str]) -> str:
    """One SHA-256 for named digests."""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _name(file: Path, below: Path) -> str:
    # Only the content of a single file counts: renaming a dataset changes nothing.
    return "" if file == below else file.relative_to(below).as_posix()
