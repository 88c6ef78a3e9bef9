"""Checkpoints made to do harm: refused, without running, reading or allocating what they ask for."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stages.backends.neuron.shards.read.read.torch_archive import read_archive
from torch.distributed.checkpoint import metadata

from stages.backends.torch.metadata import METADATA_FILE
from stages.run.errors import StageFailure
from tests.pickled import Call
from tests.torture.shard_damage import (
    MEGABYTES_FOR_DAMAGE,
    SHARD,
    change,
    most_memory,
    opened,
    outcome,
    placed,
)

pytestmark = [
    pytest.mark.torture("fuzz"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

NEEDLESSLY_TRUSTED: dict[str, Any] = {
    "a command": Call(os.system, "touch ran"),
    "an expression": Call(eval, "open('ran', 'w')"),
    "an attribute": Call(getattr, "text", "__class__"),
    "an attribute of an allowed class": Call(getattr, torch.Size, "__mro__"),
    "a call in a call": Call(Call, Call(os.system, "touch ran")),
    "a module": Call(__import__, "antigravity"),
    "a file": Call(open, "ran", "w"),
}


@pytest.mark.parametrize("value", NEEDLESSLY_TRUSTED.values(), ids=NEEDLESSLY_TRUSTED)
@pytest.mark.parametrize("place", ["the metadata", "a shard"])
def test_a_pickle_that_asks_for_more_is_refused(shards: Path, place: str, value: Any) -> None:
    if place == "the metadata":
        (shards / METADATA_FILE).write_bytes(pickle.dumps(value))
    else:
        stored = io.BytesIO()
        torch.save(value, stored)
        at = placed(opened(shards), "first")
        (shards / SHARD).write_bytes(stored.getvalue() + bytes(at.length))
        change(shards, "first", offset=0, length=len(stored.getvalue()))
    assert outcome(shards) is None


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/hostname",
        "folder/shard",
        "",
        ".",
        "..",
        "link",
        "pipe",
        "folder",
        7,
        "no\0name",
    ],
)
def test_metadata_names_no_file_but_the_checkpoints_own(shards: Path, name: Any) -> None:
    shutil.copy(shards / SHARD, shards.parent / "outside")
    (shards / "folder").mkdir()
    shutil.copy(shards / SHARD, shards / "folder" / "shard")
    (shards / "link").symlink_to("../outside")
    os.mkfifo(shards / "pipe")
    change(shards, "first", relative_path=name)
    assert outcome(shards) is None


WRONG_NUMBERS: dict[str, dict[str, Any]] = {
    "a terabyte": {"shape": torch.Size([2**40])},
    "more than there are numbers for": {"shape": torch.Size([2**40, 2**40])},
    "one wide row": {"shape": torch.Size([1, 2**40])},
    "nothing, but wide": {"shape": torch.Size([0, 2**62])},
    "a terabyte at a terabyte": {"shape": torch.Size([2**38]), "length": 2**40},
    "a size below zero": {"shape": (-3, -4)},
    "a size with a point": {"shape": (3.0, 4.0)},
    "a size in words": {"shape": "ab"},
    "a place below zero": {"offset": -1},
    "a place far away": {"offset": 2**70},
    "a place with a point": {"offset": 0.5},
    "no length": {"length": 0},
    "a length far too large": {"length": 2**70},
    "a length in words": {"length": "all"},
    "too many shards": {
        "chunks": [metadata.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([3, 4]))] * 100_000
    },
}


@pytest.mark.parametrize("changes", WRONG_NUMBERS.values(), ids=WRONG_NUMBERS)
def test_numbers_that_no_checkpoint_has_are_refused_and_take_no_memory(
    shards: Path, changes: dict[str, Any]
) -> None:
    memory = most_memory()
    change(shards, "first", **changes)
    assert outcome(shards) in (None, {}) or changes["shape"][0] == 0
    assert most_memory() - memory < MEGABYTES_FOR_DAMAGE


def rewritten(
    data: bytes,
    change: Callable[[zipfile.ZipInfo, bytes], tuple[zipfile.ZipInfo, bytes]],
    times: int = 1,
) -> bytes:
    """An archive whose records went through `change`, each written `times` times."""
    found = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(found, "w") as new:
        for info in old.infolist():
            changed_info, content = change(info, old.read(info))
            for _ in range(times):
                new.writestr(changed_info, content, compress_type=changed_info.compress_type)
    return found.getvalue()


def compressed(record: str) -> Callable[[bytes], bytes]:
    def change(info: zipfile.ZipInfo, content: bytes) -> tuple[zipfile.ZipInfo, bytes]:
        info.compress_type = (
            zipfile.ZIP_DEFLATED if info.filename.endswith(record) else zipfile.ZIP_STORED
        )
        return info, content

    return lambda data: rewritten(data, change)


def bomb(record: str) -> Callable[[bytes], bytes]:
    """256 MB of zeros behind a record's content, compressed to a quarter of a megabyte."""

    def change(info: zipfile.ZipInfo, content: bytes) -> tuple[zipfile.ZipInfo, bytes]:
        if not info.filename.endswith(record):
            return info, content
        info.compress_type = zipfile.ZIP_DEFLATED
        return info, content + bytes(1 << 28)

    return lambda data: rewritten(data, change)


def sizes_that_lie(size: int) -> Callable[[bytes], bytes]:
    """The directory at the end says that every record has this many bytes."""

    def change(data: bytes) -> bytes:
        found = bytearray(data)
        at = found.find(b"PK\1\2")
        while at >= 0:
            found[at + 20 : at + 28] = struct.pack("<II", size, size)
            at = found.find(b"PK\1\2", at + 4)
        return bytes(found)

    return change


ARCHIVES: dict[str, Callable[[bytes], bytes]] = {
    "a compressed tensor": compressed("data/0"),
    "a compressed pickle": compressed("data.pkl"),
    "a pickle that swells": bomb("data.pkl"),
    "a tensor that swells": bomb("data/0"),
    "records twice": lambda data: rewritten(data, lambda info, content: (info, content), times=2),
    "no records": lambda data: b"PK\5\6" + bytes(18),
    "sizes of nothing": sizes_that_lie(0),
    "sizes of gigabytes": sizes_that_lie(2**32 - 2),
    "sizes of one byte": sizes_that_lie(1),
    "nothing": lambda data: b"",
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("change_archive", ARCHIVES.values(), ids=ARCHIVES)
def test_archives_that_lie_are_refused_and_take_no_memory(
    shards: Path, change_archive: Callable[[bytes], bytes]
) -> None:
    place = placed(opened(shards), "first")
    stored = change_archive(
        (shards / SHARD).read_bytes()[place.offset : place.offset + place.length]
    )
    memory = most_memory()
    (shards.parent / "shard.pt").write_bytes(stored)
    with pytest.raises(StageFailure):
        read_archive(shards.parent / "shard.pt")
    (shards / SHARD).write_bytes((shards / SHARD).read_bytes() + stored)
    change(
        shards, "first", offset=(shards / SHARD).stat().st_size - len(stored), length=len(stored)
    )
    assert outcome(shards) is None
    assert most_memory() - memory < MEGABYTES_FOR_DAMAGE
