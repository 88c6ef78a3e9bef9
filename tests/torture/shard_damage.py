"""A checkpoint of the torch backend to damage, and what becomes of it."""

from __future__ import annotations

import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import filesystem, metadata

from stages.backends.torch.consolidate import consolidate
from stages.backends.torch.metadata import METADATA_FILE
from stages.run.errors import StageFailure
from tests.saved_weights import written

STATE = {
    "first": torch.arange(12.0).reshape(3, 4),
    "last": torch.arange(12.0, 24.0).reshape(3, 4),
    "half": torch.arange(6).bfloat16(),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
}
SHARD = "__0_0.distcp"
MEGABYTES_FOR_DAMAGE = 128
# Places, as fractions of a file, and the bytes that are put there.
CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4
)
same_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)


def changed(data: bytes, changes: list[tuple[float, int]], kept: float = 1) -> bytes:
    found = bytearray(data)
    for place, byte in changes:
        found[int(place * len(found))] = byte
    return bytes(found[: round(kept * len(found))])


def outcome(shards: Path) -> dict[str, torch.Tensor] | None:
    """The weights that are made of the shards; None where they are refused. Any other error is the test's failure."""
    output = shards.parent / "model"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    try:
        consolidate(shards, output, dtype=None, max_shard_size=10**9)
    except StageFailure:
        assert not list(output.iterdir())
        return None
    finally:
        assert not list(Path().iterdir())
    return written(output)


def most_memory() -> float:
    """The most that this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def opened(shards: Path) -> metadata.Metadata:
    return pickle.loads((shards / METADATA_FILE).read_bytes())


def placed(found: metadata.Metadata, name: str) -> filesystem._StorageInfo:
    """Where the metadata says that a tensor lies."""
    return next(
        place for index, place in found.storage_data.items() if index.fqn == f"model.{name}"
    )


def change(shards: Path, name: str, **changes: Any) -> None:
    """Change where the metadata says that a tensor lies, or its shape."""
    found = opened(shards)
    place = placed(found, name)
    tensor = found.state_dict_metadata[f"model.{name}"]
    for key, value in changes.items():
        if key == "shape":
            tensor.size = value
            tensor.chunks[0] = metadata.ChunkStorageMetadata(torch.Size([0] * len(value)), value)
            found.storage_data = {
                metadata.MetadataIndex(index.fqn, torch.Size([0] * len(value)))
                if index.fqn == f"model.{name}"
                else index: each
                for index, each in found.storage_data.items()
            }
        elif key == "chunks":
            tensor.chunks = value
        else:
            setattr(place, key, value)
    (shards / METADATA_FILE).write_bytes(pickle.dumps(found))
