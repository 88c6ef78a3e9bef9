"""Reading a stage's manifest: whether it is intact, and whether the files that it lists still are.

A manifest may have been cut short, edited, or copied from another machine. One without its own
digest, or with a file outside its folder, counts as none. Standard library only: make reads every
manifest at every start.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.run.digests import file_digest
from stages.run.layout import MANIFEST_FILE
from stages.run.one_look import read_once
from stages.run.progress import Progress

SEAL = "sha256"  # of the manifest itself, without this entry
PARTS = ("settings", "versions", "code", "inputs")  # of a provenance


def with_checksum(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with its own digest, which shows a reader that nothing changed it."""
    facts = {name: value for name, value in manifest.items() if name != SEAL}
    return {
        **facts,
        SEAL: hashlib.sha256(
            json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()
        ).hexdigest(),
    }


@read_once
def manifest_of(output: Path) -> dict[str, Any] | None:
    """The manifest that a stage published in `output`; None where it is missing or damaged."""
    return _read(output / MANIFEST_FILE)[0]


def manifest_in(file: Path) -> dict[str, Any] | None:
    """The manifest in `file`, of whatever output; None where it is missing or damaged."""
    return _read(file)[0]


def manifest_problem(output: Path) -> str:
    """Why `output` has no usable manifest, as text; empty where it has one."""
    return _read(output / MANIFEST_FILE)[1]


def _read(file: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        manifest = json.loads(file.read_bytes())
        whole = isinstance(manifest, dict) and with_checksum(manifest)[SEAL] == manifest.get(SEAL)
    except FileNotFoundError:
        return None, "nothing published yet"
    except OSError as error:
        return None, f"{MANIFEST_FILE} cannot be read: {error.strerror}"
    except (ValueError, RecursionError):  # not JSON, not text, or nested without end
        whole = False
    wrong = _misshapen(manifest) if whole else f"{MANIFEST_FILE} is damaged"
    return (None, wrong) if wrong else (manifest, "")


def _misshapen(manifest: dict[str, Any]) -> str:
    """What a manifest with a right digest lacks to be a stage's; empty where nothing."""
    outputs, seen, adopted = (manifest.get(name) for name in ("outputs", "seen", "adopted"))
    if (
        not isinstance(outputs, dict)
        or not isinstance(seen, dict)
        or not isinstance(adopted or [], list)
    ):
        return f"{MANIFEST_FILE} is no stage's"
    holders = [manifest, *(adopted or [])]
    made_from = [one.get("provenance") if isinstance(one, dict) else None for one in holders]
    parts = [
        *(one.get(part) if isinstance(one, dict) else None for one in made_from for part in PARTS),
        *(seen.get(part) for part in ("code", "files")),
        *outputs.values(),
    ]
    texts = [
        manifest.get("content"),
        seen.get("backend"),
        *(facts.get("sha256") for facts in outputs.values() if isinstance(facts, dict)),
    ]
    if not all(isinstance(part, dict) for part in parts) or not all(
        isinstance(text, str) for text in texts
    ):
        return f"{MANIFEST_FILE} is no stage's"
    if not all(type(facts.get("bytes")) is int for facts in outputs.values()):
        return f"{MANIFEST_FILE} is no stage's"
    outside = [name for name in (*outputs, *seen["code"]) if not _is_inside(name)]
    return f"{MANIFEST_FILE} names {outside[0]!r}, which is outside" if outside else ""


def _is_inside(name: str) -> bool:
    """Whether a name stays below the folder that it is joined to."""
    parts = {part for part in name.split("/") if part not in ("", ".")}
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\0" not in name


def file_problems(
    manifest: dict[str, Any],
    output: Path,
    read: bool = False,
    digests: Mapping[str, str] | None = None,
) -> list[str]:
    """What is no longer as published in `output`: files that are missing or have another size.

    That is cheap enough for every make. With `read` every file is compared with its digest, and
    files that were not published are reported too. No file is read through a link that leads out
    of the folder. `digests` are those of files that the caller has already read.
    """
    known = digests or {}
    found, to_read = [], []
    for name, facts in manifest["outputs"].items():
        wrong = _wrong_place(output, name, facts["bytes"])
        if wrong:
            found.append(wrong)
        else:
            to_read.append(name)
    if not read:
        return found
    found += [
        f"{name} has other bytes than were published"
        for name in to_read
        if name in known and known[name] != manifest["outputs"][name]["sha256"]
    ]
    to_read = [name for name in to_read if name not in known]
    with Progress(
        f"reading {output}", sum(manifest["outputs"][name]["bytes"] for name in to_read), "bytes"
    ) as progress:
        for name in to_read:
            found += _wrong_bytes(output, name, manifest["outputs"][name]["sha256"], progress)
    return found + [
        f"{name} was not published"
        for name in _names_below(output)
        if name not in manifest["outputs"]
    ]


def _wrong_place(output: Path, name: str, size: int) -> str:
    try:
        found = os.lstat(output / name)
    except (OSError, ValueError):
        return f"{name} is missing"
    if not stat.S_ISREG(found.st_mode):
        return f"{name} is no plain file"
    return f"{name} has {found.st_size} bytes, not {size}" if found.st_size != size else ""


def _wrong_bytes(output: Path, name: str, expected: str, progress: Progress) -> list[str]:
    path = output / name
    if not path.resolve().is_relative_to(output.resolve()):
        return [f"{name} is outside, through a link"]
    try:
        same = file_digest(path, progress.update) == expected
    except OSError as error:
        return [f"{name} cannot be read: {error.strerror}"]
    return [] if same else [f"{name} has other bytes than were published"]


def _names_below(output: Path) -> list[str]:
    """The files and links below `output`, but for its manifest; no link is followed."""
    names = []
    for folder, folders, files in os.walk(output):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        names += [Path(folder, name).relative_to(output).as_posix() for name in (*files, *links)]
    return sorted(
        name for name in names if name not in (MANIFEST_FILE, f".{MANIFEST_FILE}")
    )  # the second is what a kill left of writing the first
