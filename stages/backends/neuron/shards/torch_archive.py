"""torch.save's archives read in place: what a file holds, and where in it the bytes of each tensor lie.

An archive is a ZIP file, not compressed: a pickle that describes the object, and one record for each tensor's memory, with its CRC-32. Only
the pickle is read here, by an unpickler that knows a few names and maps each to something inert, so a file can neither run code nor need
the packages that wrote it; rows of a tensor are then read where they lie.
"""

from __future__ import annotations

import collections
import math
import os
import pickle
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model.inert_unpickler import InertUnpickler
from stages.model.weights import DTYPES, PIECE_BYTES
from stages.run.errors import StageFailure

if TYPE_CHECKING:
    import torch

# The classes by which a pickle names the dtype of a tensor's memory.
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


LARGEST_TENSOR = 1 << 48  # elements


@dataclass(frozen=True)
class Record:
    """`size` bytes from `start` on of a file, and the CRC-32 that was written for them."""

    file: Path
    start: int
    size: int
    crc: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose elements lie in `record`, in row-major order from element `offset` on."""

    record: Record
    dtype: str
    shape: tuple[int, ...]
    offset: int


class TensorReference:
    """Where torch_xla would have an object of this name: the tensor lies in a file of its own, whose number is `tid`."""

    tid: int


@dataclass(frozen=True)
class Placeholder:
    """A tensor that was saved without data (meta device)."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Storage:
    record: Record
    dtype: str


class _Unpickler(InertUnpickler):
    """Builds containers, numbers, text and the classes above. Every other name that a pickle asks for is an error."""

    def __init__(self, file: Any, records: Mapping[str, Record]):
        super().__init__(file)
        self._records = records

    def fill(self, instance: Any, state: Any) -> None:
        if isinstance(instance, TensorReference):
            instance.tid = state["tid"]
        elif not isinstance(
            instance, collections.OrderedDict
        ):  # a state dict has the modules' versions as an attribute: not needed
            super().fill(instance, state)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in DTYPES:
            return name
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        return super().find_class(module, name)

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, key, _, elements = identity
        record = self._records.get(f"data/{key}") if isinstance(key, str) else None
        if kind != "storage" or record is None or record.size != elements * DTYPES[dtype][1]:
            raise pickle.UnpicklingError(f"the memory {reprlib.repr(key)} of a tensor is not in it")
        return _Storage(record, dtype)


def _tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> StoredTensor:
    """In place of torch._utils._rebuild_tensor_v2. XLA hands its tensors to the host in row-major order, so nothing else is met."""
    if not all(type(number) is int for number in (offset, *shape, *strides)):
        raise pickle.UnpicklingError("a tensor's shape is not made of whole numbers")
    row_major = tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))
    if any(size > 1 and a != b for size, a, b in zip(shape, strides, row_major, strict=True)):
        raise pickle.UnpicklingError(
            f"a tensor of shape {list(shape)} has strides {list(strides)}: save it with .contiguous()"
        )
    end = (offset + math.prod(shape)) * DTYPES[storage.dtype][1]
    # Without elements a shape needs no memory, and can be larger than any tensor's.
    if (
        min(offset, *shape, 0) < 0
        or end > storage.record.size
        or math.prod(max(1, size) for size in shape) > LARGEST_TENSOR
    ):
        raise pickle.UnpicklingError(f"a tensor of shape {list(shape)} reaches beyond its memory")
    return StoredTensor(storage.record, storage.dtype, tuple(shape), offset)


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch", "Tensor"): None,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): lambda _dtype, shape, *_: Placeholder(
        tuple(shape)
    ),
    ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, _type, arguments, _state: rebuild(
        *arguments
    ),
    ("torch_xla.utils.serialization", "TensorReference"): TensorReference,
}


def read_archive(path: Path) -> Any:
    """What torch.save wrote to `path`, with a StoredTensor for each tensor.

    Raises StageFailure when it is damaged, cut short or asks for anything that a checkpoint does not need.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if len(entries) < len(archive.infolist()):
                raise zipfile.BadZipFile("it holds two records of one name")
            records = {name: _record(path, file, info) for name, info in entries.items()}
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise zipfile.BadZipFile("it was written on a big-endian machine")
            with archive.open(entries["data.pkl"]) as described:  # checks the pickle's own CRC-32
                return _Unpickler(described, records).load()
    except Exception as error:  # from damaged bytes, zipfile and pickle raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise StageFailure(f"{path} cannot be read: {reason}.") from error


def _record(path: Path, file: Any, info: zipfile.ZipInfo) -> Record:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise zipfile.BadZipFile(
            f"its record {info.filename} is compressed, which torch.save never does"
        )
    # APPNOTE.TXT 4.3.7: a local header is 30 bytes, its last four the lengths of the name and of the extra field that follow it.
    header = os.pread(file.fileno(), 30, info.header_offset)
    start = info.header_offset + 30 + sum(struct.unpack("<26xHH", header))
    if start + info.file_size > os.fstat(file.fileno()).st_size:
        raise zipfile.BadZipFile(f"it ends before its record {info.filename}")
    return Record(path, start, info.file_size, info.CRC)


class RowReader:
    """Reads rows of stored tensors. The first time that a record is needed, all of it is held against its CRC-32."""

    def __init__(self) -> None:
        self._checked: set[Record] = set()

    @property
    def bytes_read(self) -> int:
        """Bytes of the records that were needed, each counted once."""
        return sum(record.size for record in self._checked)

    def rows(self, tensor: StoredTensor, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (of the first dimension) of a tensor that has one at least."""
        import torch

        if tensor.record not in self._checked:
            self._check(tensor.record)
            self._checked.add(tensor.record)
        dtype = getattr(torch, tensor.dtype)
        rows = torch.empty(last - first, *tensor.shape[1:], dtype=dtype)
        position = tensor.offset + first * math.prod(tensor.shape[1:])
        _fill(
            tensor.record, position * dtype.itemsize, rows.view(-1).view(torch.uint8).numpy().data
        )
        return rows

    def _check(self, record: Record) -> None:
        buffer = memoryview(bytearray(min(record.size, PIECE_BYTES)))
        crc = 0
        for position in range(0, record.size, PIECE_BYTES):
            piece = buffer[: record.size - position]
            _fill(record, position, piece)
            crc = zlib.crc32(piece, crc)
        if crc != record.crc:
            raise StageFailure(
                f"{record.file} is damaged: the checksum of {record.size} bytes from byte {record.start} on is {crc:08x}, "
                f"{record.crc:08x} was written. Use an earlier checkpoint."
            )


def _fill(record: Record, position: int, data: memoryview) -> None:
    """Read the record's bytes from `position` on into `data`."""
    with record.file.open("rb", buffering=0) as file:
        done = 0
        while done < len(data):
            count = os.preadv(file.fileno(), [data[done:]], record.start + position + done)
            if count == 0:
                raise StageFailure(
                    f"{record.file} ends at byte {record.start + position + done}. Use an earlier checkpoint."
                )
            done += count
