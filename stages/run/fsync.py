"""Bytes on the disk, not only in memory: what a power cut leaves.

A file's bytes are safe once the file is flushed, its name once the folder that holds it is. Whoever renames a finished folder into
its place flushes what is in it first: the name must not outlive the bytes.
"""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file below `folder`, and every folder, the innermost first and `folder` itself last."""
    for inner, _, names in os.walk(folder, topdown=False):
        for name in names:
            if (Path(inner) / name).is_file():  # what else there is (a socket) holds no bytes
                flush(Path(inner) / name)
        flush(Path(inner))


def make_durable_folder(folder: Path) -> None:
    """Make `folder` and those above it where they are not there, so that they stay."""
    if folder.is_dir():
        return
    make_durable_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush(folder.parent)
