"""The metadata of a torch.distributed.checkpoint (DCP) folder, which is a pickle: read with DCP's own classes and no others."""

from __future__ import annotations

import io
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

# What torch 2.8 to 2.13 puts into the metadata's pickle, besides plain containers and torch's dtypes.
METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath",),
    "collections": ("OrderedDict",),
}


def read_metadata(path: Path) -> Metadata:
    """The metadata in the file `path`. Raises UnpicklingError for what has no place in one, and, for damaged bytes, anything."""
    return _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()


class _MetadataUnpickler(pickle.Unpickler):
    """Builds DCP's metadata and nothing else: a pickle can name any function for the reader to call."""

    def find_class(self, module: str, name: str) -> Any:
        if name in METADATA_CLASSES.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # how Python 3.11.0 to 3.11.3 pickles a member of an Enum
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def _enum_member(kind: type, name: str) -> Enum:
    """The member of an Enum, as getattr gives it; nothing else is looked up."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"{kind!r} is no Enum, and nothing else is looked up in a checkpoint's metadata")
    return kind[name]
