"""What a torch.distributed.checkpoint (DCP) folder holds, by its metadata: a pickle, read with DCP's own classes and no others.

Nothing in it is believed: files are the folder's own, and no shape is larger than the bytes that are to fill it.
"""

from __future__ import annotations

import importlib
import io
import math
import operator
import pickle
import reprlib
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from stages.model.inert_unpickler import InertUnpickler
from stages.model.weights import DTYPES, TensorSpec
from stages.run.errors import StageFailure

METADATA_FILE = ".metadata"
MOST_SHARDS = 4096  # of one tensor: as many as there are ranks

# What torch 2.8 to 2.13 puts into the metadata's pickle, besides plain containers and torch's dtypes.
METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        *(
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
        ),
        *("TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath",),
    "collections": ("OrderedDict",),
}
LARGEST = 1 << 28  # bytes


@dataclass(frozen=True)
class Shard:
    """A box of a tensor: `shape` elements from `start` on, archived in `length` bytes from `offset` on of `file`."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    offset: int
    length: int

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(map(operator.add, self.start, self.shape))


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor of the checkpoint, under the name that it has in the model, and the boxes that make it up."""

    spec: TensorSpec
    shards: list[Shard]


def sharded_tensors(folder: Path, prefix: str) -> dict[str, ShardedTensor]:
    """Name -> tensor for the entries of the DCP folder that begin with `prefix`, in the checkpoint's order."""
    path = folder / METADATA_FILE
    if not path.is_file():
        raise StageFailure(
            f"{path} is missing. DCP writes it last, so this checkpoint was never finished; use an earlier one."
        )
    try:
        metadata = read_metadata(path)
        tensors = {
            key.removeprefix(prefix): _sharded_tensor(
                folder, key, key.removeprefix(prefix), metadata
            )
            for key in metadata.state_dict_metadata
            if key.startswith(prefix)
        }
    except StageFailure:
        raise
    except Exception as error:  # a damaged pickle raises anything, as pickle's documentation says
        raise StageFailure(
            f"{path} cannot be read: {error!r}. Use an earlier checkpoint."
        ) from error
    if not tensors:
        raise StageFailure(f"The checkpoint {folder} has no entry that begins with {prefix!r}.")
    return tensors


def _sharded_tensor(folder: Path, key: str, name: str, metadata: Metadata) -> ShardedTensor:
    """The tensor that the checkpoint holds under `key`, as its metadata describes it."""
    stored = metadata.state_dict_metadata[key]
    if not isinstance(stored, TensorStorageMetadata):
        raise StageFailure(
            f"{folder}: the entry {key} is not a tensor, so it cannot be one of a model's weights."
        )
    shards: list[Shard] = []
    if len(stored.chunks) > MOST_SHARDS:
        raise ValueError(f"{key} has {len(stored.chunks):,} shards, above {MOST_SHARDS:,}")
    for chunk in stored.chunks:
        place = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
        if place is None:
            raise StageFailure(
                f"{folder / METADATA_FILE} does not say where the shard of {key} at {list(chunk.offsets)} lies."
            )
        if getattr(place, "transform_descriptors", None):
            raise StageFailure(
                f"{folder / place.relative_path}: {key} went through {place.transform_descriptors}; save it plainly."
            )
        file = file_in(folder, place.relative_path)
        shards.append(
            Shard(tuple(chunk.offsets), tuple(chunk.sizes), file, place.offset, place.length)
        )
    tensor = ShardedTensor(
        TensorSpec(name, tuple(stored.size), str(stored.properties.dtype).removeprefix("torch.")),
        shards,
    )
    _check_numbers(tensor)
    return tensor


def file_in(folder: Path, name: str) -> Path:
    """The file `name` of the folder itself; ValueError for a name of any other place."""
    if Path(name).name != name or (folder / name).is_symlink():
        raise ValueError(f"it names the file {name}, which is not one of the checkpoint's own")
    return folder / name


def _check_numbers(tensor: ShardedTensor) -> None:
    """Raise ValueError for a shape or a place that no tensor has. A shape that its file cannot fill would take memory before it failed."""
    rank, dtype = len(tensor.spec.shape), tensor.spec.dtype
    if dtype not in DTYPES:
        raise ValueError(f"{tensor.spec.name} is of dtype {dtype}")
    for shard in tensor.shards:
        numbers = (*tensor.spec.shape, *shard.start, *shard.shape, shard.offset, shard.length)
        if not all(type(number) is int and number >= 0 for number in numbers) or {
            len(shard.start),
            len(shard.shape),
        } != {rank}:
            raise ValueError(
                f"the shard of {tensor.spec.name} at {reprlib.repr(shard.start)} has a shape or a place that no shard has"
            )
        if math.prod(shard.shape) * DTYPES[dtype][1] > shard.length:
            raise ValueError(
                f"{tensor.spec.name}: {shard.length} bytes hold no shard of {list(shard.shape)} {dtype}"
            )


def read_metadata(path: Path) -> Metadata:
    """The metadata in the file `path`. Raises UnpicklingError for what has no place in one, and, for damaged bytes, anything."""
    size = path.stat().st_size
    if size > LARGEST:
        raise pickle.UnpicklingError(
            f"{size:,} bytes are no checkpoint's metadata, which has {LARGEST:,} at most"
        )
    return _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()


class _MetadataUnpickler(InertUnpickler):
    """Builds DCP's metadata and nothing else: a pickle can name any function for the reader to call."""

    def find_class(self, module: str, name: str) -> Any:
        if name in METADATA_CLASSES.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return getattr(importlib.import_module(module), name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # how Python 3.11.0 to 3.11.3 pickles a member of an Enum
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")

    def fill(self, instance: Any, state: Any) -> None:
        if not is_dataclass(instance) or isinstance(
            instance, type
        ):  # a class that is changed is changed for everybody
            raise pickle.UnpicklingError(
                f"a {type(instance).__name__} that is changed has no place in a checkpoint's metadata"
            )
        set_state = getattr(type(instance), "__setstate__", None)
        if set_state is not None:
            set_state(instance, state)
        else:
            vars(instance).update(state)


def _enum_member(kind: type, name: str) -> Enum:
    """The member of an Enum, as getattr gives it; nothing else is looked up."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(
            f"a {type(kind).__name__} is no Enum, and nothing else is looked up in a checkpoint's metadata"
        )
    return kind[name]
