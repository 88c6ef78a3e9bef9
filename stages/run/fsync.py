"""fsync: what a power cut must not lose.

fsync a file to persist its bytes, its folder to persist its name. Before a finished folder is
renamed into place, fsync its contents: a power cut could otherwise leave a name without data.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flush(path: Path) -> None:
    """fsync a file's bytes, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, the innermost first, and `folder` itself last."""
    for inner, _, names in os.walk(folder, topdown=False):
        for name in names:
            if (Path(inner) / name).is_file():
                flush(Path(inner) / name)
        flush(Path(inner))


def make_durable_folder(folder: Path) -> None:
    """Create `folder` and its missing parents, so that a power cut does not lose them."""
    if folder.is_dir():
        return
    make_durable_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush(folder.parent)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which becomes `folder` when the block ends; removed, with nothing
    in its place, when the block raises. What a killed process left of it is removed first."""
    writing = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    make_durable_folder(writing)
    try:
        yield writing
        fsync_tree(writing)
        writing.rename(folder)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    flush(folder.parent)
