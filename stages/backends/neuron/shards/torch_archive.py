"""The files that torch.save wrote for NeuronTrainer, opened without the Neuron packages, and rows
of their tensors.

torch maps a file into memory, so opening one reads only its description. Mapped pages count as this
process's memory once they are read: rows are therefore read from where they begin in the file.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.backends.hashed_file import HashedFile
from stages.model.from_pickles import load_pickle
from stages.run.errors import StageFailure

if TYPE_CHECKING:
    import torch

# Of a record in a zip archive, just before its name: 26 bytes, then the lengths of its name and of
# its extra field (APPNOTE.TXT 4.3.7).
RECORD_HEADER = struct.Struct("<26xHH")


class TensorReference:
    """What torch_xla has under this name: the tensor is in a file of its own, whose number is
    `tid`."""

    tid: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in `file`: the entry `name` of a dict, or, where that is None, all that the file
    holds. Its elements begin at byte `offset`; None: they are not all there in their order."""

    file: Path
    name: str | None
    dtype: str
    shape: tuple[int, ...]
    offset: int | None


def read_archive(path: Path) -> Any:
    """What torch.save wrote to `path`. Raises StageFailure when it is damaged or asks for more than
    a checkpoint needs."""
    return load_pickle(
        path, known=[(TensorReference, "torch_xla.utils.serialization.TensorReference")]
    )


def damage(path: Path) -> str:
    """Why the file, all of which is read, does not match the checksums in it; empty where it
    does."""
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except Exception as error:  # from damaged bytes, zipfile raises anything
        return f"{path} is damaged: {error}."
    return f"{path} is damaged: the checksum of {record} does not match." if record else ""


def mapped_at(path: Path, tensors: Iterable[torch.Tensor]) -> int | None:
    """The address of the first byte of the archive at `path`, which `read_archive` mapped for all
    its `tensors`; None where nothing was mapped."""
    addresses = {
        storage.data_ptr()
        for tensor in tensors
        if not tensor.is_meta and (storage := tensor.untyped_storage()).nbytes()
    }
    starts = _record_starts(path)
    if not addresses or not starts:
        return None
    first = min(addresses) - min(starts)
    return first if addresses == {first + start for start in starts} else None


def _record_starts(path: Path) -> set[int]:
    """Where in the file the bytes of its storages begin; nowhere, in what is no archive."""
    starts = set()
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if "/data/" in record.filename and record.file_size:
                    file.seek(record.header_offset)
                    lengths = RECORD_HEADER.unpack(file.read(RECORD_HEADER.size))
                    starts.add(record.header_offset + RECORD_HEADER.size + sum(lengths))
    except Exception:  # from damaged bytes, zipfile raises anything
        return set()
    return starts


class RowReader:
    """Reads rows of stored tensors, counts the bytes, and hashes the files on the way."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self._files: dict[Path, HashedFile] = {}

    def rows(self, stored: StoredTensor, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (of the first dimension) of a tensor that has one at least."""
        import torch

        rows: torch.Tensor
        if stored.offset is None:
            content = read_archive(stored.file)
            whole = content if stored.name is None else content[stored.name]
            rows = whole[first:last].detach().clone()
        else:
            dtype = getattr(torch, stored.dtype)
            rows = torch.empty(last - first, *stored.shape[1:], dtype=dtype)
            file = self._files.setdefault(stored.file, HashedFile(stored.file))
            skipped = first * math.prod(stored.shape[1:]) * dtype.itemsize
            file.read_into(rows.view(-1).view(torch.uint8).numpy().data, stored.offset + skipped)
        if len(rows) != last - first:
            raise StageFailure(f"{stored.file} changed while it was read.")
        self.bytes_read += rows.nbytes
        return rows

    def digests(self, folder: Path) -> dict[str, str]:
        """SHA-256 of the files that were read, by their names below `folder`."""
        return {
            path.relative_to(folder).as_posix(): file.sha256() for path, file in self._files.items()
        }
