"""What of a checkpoint is no longer as it was written; the ranks share the reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from stages.run.digests import file_digest

LIST = "files.json"  # name -> bytes and sha256 of each other file of a checkpoint


def damage(checkpoint: Path) -> list[str]:
    """What a checkpoint has no longer as it was written, the same on every rank; each reads its
    share of the files."""
    written = agreed(_listed(checkpoint))
    if written is None:
        return [f"its list of files, {LIST}, is missing or cannot be read"]
    found = facts_of(checkpoint, sorted(written))
    wrong = []
    for name, facts in written.items():
        if name not in found:
            wrong.append(f"{name} is missing or cannot be read")
        elif found[name]["bytes"] != facts["bytes"]:
            wrong.append(f"{name} has {found[name]['bytes']} bytes, not {facts['bytes']}")
        elif found[name]["sha256"] != facts["sha256"]:
            wrong.append(f"{name} has other bytes than were written")
    return wrong


def _listed(checkpoint: Path) -> dict[str, dict[str, Any]] | None:
    """What was listed when it was written; None where that cannot be read."""
    try:
        listed = json.loads((checkpoint / LIST).read_bytes())
        return {
            Path(name).name: {"bytes": facts["bytes"], "sha256": facts["sha256"]}
            for name, facts in listed.items()
        } or None
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ):  # damaged bytes may be JSON of any shape
        return None


def facts_of(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of each file that can be read. Every rank reads its share and is given
    all."""
    mine = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        try:
            mine[name] = {
                "bytes": (folder / name).stat().st_size,
                "sha256": file_digest(folder / name),
            }
        except (OSError, ValueError):  # a damaged list may hold what no file can be called
            continue
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return {name: facts for share in shares for name, facts in share.items()}


def agreed(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
