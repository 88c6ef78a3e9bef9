"""What the Hub's cache on this machine holds of a model or dataset, and whether that is whole and
right.

The Hub's library compares sizes only, and off-line it passes on a snapshot with files missing. Here
a file that was just fetched is read against its digest, by which the cache names it; and what a
commit consists of is noted next to it while the Hub can be asked.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

_PIECE = 2**20  # bytes


def folder_of(kind: str, name: str) -> Path:
    """The cache's folder of a repository (kind: model or dataset), whether it is there or not."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)


def blobs(kind: str, name: str) -> dict[Path, int]:
    """Every file that the cache holds of the repository with its bytes, half fetched ones
    (`.incomplete`) too."""
    return {
        path: path.stat().st_size
        for path in folder_of(kind, name).glob("blobs/*")
        if path.is_file()
    }


def remove_wrong(kind: str, name: str, files: Sequence[Path]) -> list[str]:
    """Remove those of the blobs whose content has not the digest that names them; returns the
    removed names.

    A proxy's page in the middle of a download is enough: the library keeps it as the file's
    beginning and fetches the rest after it.
    """
    wrong = [
        path
        for path in files
        if path.suffix != ".incomplete" and path.is_file() and not _as_named(path)
    ]
    for snapshot in folder_of(kind, name).glob("snapshots/*/**/*"):
        if snapshot.is_symlink() and snapshot.resolve() in {path.resolve() for path in wrong}:
            snapshot.unlink()
    for path in wrong:
        path.unlink()
    return [path.name for path in wrong]


def remove_halves(kind: str, name: str) -> None:
    """Remove what was fetched of files by halves: nothing that the Hub has can be its
    continuation."""
    for path in folder_of(kind, name).glob("blobs/*.incomplete"):
        path.unlink(missing_ok=True)


def note_listing(kind: str, name: str, commit: str, files: Sequence[str]) -> None:
    """Note what the commit holds, so that off-line a snapshot with files missing is not taken for
    whole."""
    note = _note(kind, name, commit)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(sorted(files)), encoding="utf-8")
    except OSError:
        return  # a cache that is read-only: anyone who filled it answers for it


def missing(kind: str, name: str, snapshot: Path, patterns: Sequence[str]) -> list[str]:
    """Files that match `patterns` and that the snapshot is to hold and does not.

    A cache that others filled has no note of what belongs to it: then one file is asked for at
    least, descriptions aside.
    """
    try:
        listing = json.loads(_note(kind, name, snapshot.name).read_bytes())
    except (OSError, ValueError):
        asked = [pattern for pattern in patterns if pattern != "*.json"]
        instead = (
            ["*.bin"] if "*.safetensors" in asked else []
        )  # weights of the other kind: the caller sees to those
        return (
            []
            if any(path for pattern in asked + instead for path in snapshot.glob(pattern))
            else asked[:1]
        )
    wanted = [
        file for file in listing if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
    ]
    return [file for file in wanted if not (snapshot / file).is_file()]


def commit_of(kind: str, name: str, revision: str) -> str:
    """The commit that `revision` was when the Hub was last asked; the revision itself where it was
    never asked for."""
    try:
        return (
            (folder_of(kind, name) / "refs" / (revision or "main"))
            .read_text(encoding="utf-8")
            .strip()
        )
    except OSError:
        return revision


def _note(kind: str, name: str, commit: str) -> Path:
    return folder_of(kind, name) / "listings" / f"{commit}.json"


def _as_named(blob: Path) -> bool:
    """Whether a blob has the digest that is its name: SHA-256 of large files, git's of others; any
    other name is not looked at."""
    if len(blob.name) not in (40, 64) or not set(blob.name) <= set("0123456789abcdef"):
        return True
    digest = (
        hashlib.sha256()
        if len(blob.name) == 64
        else hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    )
    with blob.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest() == blob.name
