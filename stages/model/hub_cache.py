"""Check that the Hub's cache on this machine holds a model or dataset completely and correctly.

The Hub's library compares only sizes, and off-line it returns a snapshot with files missing. This
module checks a fetched file against its digest, which is its name in the cache, and records the
files of a commit while the Hub can be asked.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

_PIECE = 2**20  # bytes


def folder_of(kind: str, name: str) -> Path:
    """The cache's folder of a repository (kind: model or dataset); it may not exist."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)


def blobs(kind: str, name: str) -> dict[Path, int]:
    """Every file of the repository in the cache -> its bytes; partly fetched ones (`.incomplete`)
    too."""
    return {
        path: path.stat().st_size
        for path in folder_of(kind, name).glob("blobs/*")
        if path.is_file()
    }


def remove_corrupt(kind: str, name: str, files: Sequence[Path]) -> list[str]:
    """Remove the blobs whose content does not have the digest that names them; return their names.

    A proxy's page in the middle of a download is enough for that: the library keeps it as the
    beginning of the file and fetches the rest after it.
    """
    corrupt = [
        path
        for path in files
        if path.suffix != ".incomplete" and path.is_file() and not _has_named_digest(path)
    ]
    for snapshot in folder_of(kind, name).glob("snapshots/*/**/*"):
        if snapshot.is_symlink() and snapshot.resolve() in {path.resolve() for path in corrupt}:
            snapshot.unlink()
    for path in corrupt:
        path.unlink()
    return [path.name for path in corrupt]


def remove_incomplete(kind: str, name: str) -> None:
    """Remove partly fetched files, where no file on the Hub continues them."""
    for path in folder_of(kind, name).glob("blobs/*.incomplete"):
        path.unlink(missing_ok=True)


def note_listing(kind: str, name: str, commit: str, files: Sequence[str]) -> None:
    """Record the files of a commit, so that an incomplete snapshot is noticed off-line."""
    note = _note(kind, name, commit)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(sorted(files)), encoding="utf-8")
    except OSError:
        return  # the cache is read-only: the user who filled it is responsible for it


def missing(kind: str, name: str, snapshot: Path, patterns: Sequence[str]) -> list[str]:
    """Files that match `patterns` and are missing from the snapshot.

    A cache that another program filled has no record of its files: then at least one file must
    exist that is not a description (*.json).
    """
    try:
        listing = json.loads(_note(kind, name, snapshot.name).read_bytes())
    except (OSError, ValueError):
        required = [pattern for pattern in patterns if pattern != "*.json"]
        # Pickled weights also count: the caller handles them.
        pickles = ["*.bin"] if "*.safetensors" in required else []
        exists = any(path for pattern in required + pickles for path in snapshot.glob(pattern))
        return [] if exists else required[:1]
    matches = [
        file for file in listing if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
    ]
    return [file for file in matches if not (snapshot / file).is_file()]


def commit_of(kind: str, name: str, revision: str) -> str:
    """The commit of `revision` when the Hub was last asked; `revision` where it was never asked."""
    ref = folder_of(kind, name) / "refs" / (revision or "main")
    try:
        return ref.read_text(encoding="utf-8").strip()
    except OSError:
        return revision


def _note(kind: str, name: str, commit: str) -> Path:
    return folder_of(kind, name) / "listings" / f"{commit}.json"


def _has_named_digest(blob: Path) -> bool:
    """Whether a blob has the digest that is its name: SHA-256 of large files, git's of others.
    Other names are ignored."""
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
