"""From a training checkpoint's shards to whole weights: reads a torch.distributed.checkpoint (DCP) folder, hands on safetensors files.

DCP's own way out (dcp_to_torch_save) holds the whole model in memory. A shard, however, is a torch.save archive (a ZIP file, not
compressed) at a known offset of a known file, so any rows of it can be read where they lie: tensors pass through in pieces of a few MB
however large they are. Every byte is checked against the archive's CRC-32 on the way, which finds a file that a crash left full of zeros.

Nothing in a checkpoint is trusted: the metadata is unpickled with DCP's own classes only, the tensors with weights_only.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import skip_data

from stages.backends.torch.metadata import Shard, ShardedTensor, sharded_tensors
from stages.model.weights import PIECE_BYTES, write_safetensors
from stages.run.contract import Consolidated
from stages.run.errors import StageFailure

PROBLEMS_SHOWN = 5


def consolidate(
    shards: Path,
    output: Path,
    *,
    dtype: str | None,
    max_shard_size: int,
    prefix: str = "model.",
    tied: Mapping[str, str] | None = None,
    base: Path | None = None,
) -> Consolidated:
    """Write the model in the DCP folder `shards` to the existing folder `output` as safetensors, cast to `dtype` (None: as it was trained).

    The model's tensors are the checkpoint's entries whose names begin with `prefix`, which is cut off. `tied` gives, for each name that is
    the same parameter as another, that other (`lm_head.weight` -> `model.embed_tokens.weight`): it is left out, as save_pretrained does.
    `base` is for adapters, of which this backend makes none.

    Returns tensors and parameters (how many were written), bytes_read, and files (name -> SHA-256). Raises StageFailure, with nothing left
    in `output`, for a shard that is missing, short, damaged or does not cover its tensor, for a value that is not finite, and for tied
    parameters that are not equal (training lost the tie, and dropping one would change the model).
    """
    tensors = sharded_tensors(shards, prefix)
    problems = list(itertools.islice(_problems(tensors), PROBLEMS_SHOWN))
    if problems:
        raise StageFailure(
            "\n".join([f"The checkpoint {shards} is not whole; use an earlier one.", *problems])
        )
    with contextlib.ExitStack() as stack:
        files = {
            file: stack.enter_context(file.open("rb"))
            for file in {shard.file for tensor in tensors.values() for shard in tensor.shards}
        }
        for name, kept in (tied or {}).items():
            if name in tensors and kept in tensors:
                _check_tie(tensors[name], tensors[kept], files)
                del tensors[name]
        sources = [(tensor.spec, partial(_read, tensor, files)) for tensor in tensors.values()]
        digests = write_safetensors(sources, output, max_shard_size=max_shard_size, dtype=dtype)
    return {
        "tensors": len(tensors),
        "parameters": sum(tensor.spec.elements for tensor in tensors.values()),
        "bytes_read": sum(shard.length for tensor in tensors.values() for shard in tensor.shards),
        "files": digests,
    }


def _problems(tensors: dict[str, ShardedTensor]) -> Iterator[str]:
    """What can be seen to be wrong before anything is read: files that are missing or short, boxes that leave holes or overlap."""
    needed: dict[Path, tuple[int, str]] = {}
    for name, tensor in tensors.items():
        for shard in tensor.shards:
            needed[shard.file] = max(
                needed.get(shard.file, (0, "")), (shard.offset + shard.length, name)
            )
        found = sum(math.prod(shard.shape) for shard in tensor.shards)
        boxes = [shard for shard in tensor.shards if math.prod(shard.shape)]
        outside = any(
            end > size
            for shard in boxes
            for end, size in zip(shard.end, tensor.spec.shape, strict=True)
        )
        if (
            found != tensor.spec.elements
            or outside
            or any(itertools.starmap(_overlap, itertools.combinations(boxes, 2)))
        ):
            yield f"{name}: its shards ({found} values) do not cover its shape {list(tensor.spec.shape)} exactly once."
    for file, (size, name) in needed.items():
        if not file.is_file():
            yield f"{file} is missing; {name} lies in it."
        elif file.stat().st_size < size:
            yield f"{file} is cut short: it has {file.stat().st_size} bytes, {name} ends at byte {size}."


def _overlap(first: Shard, second: Shard) -> bool:
    return all(
        a < d and c < b
        for a, b, c, d in zip(first.start, first.end, second.start, second.end, strict=True)
    )


def _check_tie(tensor: ShardedTensor, kept: ShardedTensor, files: Mapping[Path, BinaryIO]) -> None:
    same = (tensor.spec.shape, tensor.spec.dtype) == (kept.spec.shape, kept.spec.dtype)
    if same:
        # Equal shape and dtype are cut into equal pieces, whatever the shards.
        same = all(
            torch.equal(a, b) for a, b in zip(_read(tensor, files), _read(kept, files), strict=True)
        )
    if not same:
        raise StageFailure(
            f"{tensor.spec.name} and {kept.spec.name} are one parameter in config.json but two different ones in the checkpoint: "
            "training untied them. Set tie_word_embeddings to false, or train with them tied."
        )


def _read(tensor: ShardedTensor, files: Mapping[Path, BinaryIO]) -> Iterator[torch.Tensor]:
    """The whole tensor in blocks of rows (its first dimension) of about PIECE_BYTES, put together from the shards that reach into each."""
    shape = tensor.spec.shape or (1,)
    dtype = getattr(torch, tensor.spec.dtype)
    rows = max(1, PIECE_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
    readers = [
        _ShardReader(shard, tensor.spec.name, dtype, files[shard.file])
        for shard in tensor.shards
        if math.prod(shard.shape)
    ]
    for first in range(0, shape[0], rows):
        block = torch.empty(min(rows, shape[0] - first), *shape[1:], dtype=dtype)
        for reader in readers:
            reader.copy_rows(block, first)
        yield block


class _ShardReader:
    """Reads one shard's rows in order, straight from its file; checks the archive's CRC-32 when the last row has passed."""

    def __init__(self, shard: Shard, name: str, dtype: torch.dtype, file: BinaryIO):
        self.shard, self.name, self.file = shard, name, file
        self.start, self.shape = shard.start or (0,), shard.shape or (1,)
        self.crc = 0
        try:
            with io.BufferedReader(_Slice(file, shard.offset, shard.length)) as archive:
                start, size, self.expected_crc = _stored_record(archive)
                self.position = shard.offset + start
                with (
                    skip_data()
                ):  # shape, strides and dtype; memory that is reserved but not touched
                    saved = torch.load(archive, map_location="cpu", weights_only=True)
            if saved.untyped_storage().nbytes() != size:
                raise ValueError(
                    f"its pickle says {saved.untyped_storage().nbytes()} bytes, the archive has {size}"
                )
        except Exception as error:  # from damaged bytes, zipfile and pickle raise anything
            reason = (
                error.__context__ or error
            )  # torch's own words advise to open it without weights_only
            raise self._failure(str(reason).partition("\n")[0].partition(". ")[0]) from error
        if not isinstance(saved, torch.Tensor) or (saved.shape, saved.dtype) != (
            torch.Size(shard.shape),
            dtype,
        ):
            raise self._failure("it is not what the metadata says")
        self.whole: torch.Tensor | None = None
        if not saved.is_contiguous() or saved.untyped_storage().nbytes() != saved.nbytes:
            # A transposed tensor: its rows do not lie together, so the shard is read whole.
            self._fill(torch.empty(0, dtype=torch.uint8).set_(saved.untyped_storage()))
            self._check_crc()
            self.whole = saved

    def copy_rows(self, block: torch.Tensor, first: int) -> None:
        """Copy what the shard has of the tensor's rows from `first` on into `block`. Blocks must come in order."""
        begin, end = (
            max(self.start[0], first),
            min(self.start[0] + self.shape[0], first + block.shape[0]),
        )
        if begin >= end:
            return
        box = block[begin - first : end - first]
        for dimension in range(1, block.dim()):
            box = box.narrow(dimension, self.start[dimension], self.shape[dimension])
        if self.whole is not None:
            box.copy_(self.whole[begin - self.start[0] : end - self.start[0]])
            return
        rows = box if box.is_contiguous() else torch.empty(box.shape, dtype=box.dtype)
        self._fill(rows.view(-1).view(torch.uint8))
        if rows is not box:
            box.copy_(rows)
        if end == self.start[0] + self.shape[0]:
            self._check_crc()

    def _fill(self, out: torch.Tensor) -> None:
        """Read the next bytes of the shard's data into `out`, a uint8 vector."""
        data = out.numpy().data
        done = 0
        while done < len(data):
            count = os.preadv(self.file.fileno(), [data[done:]], self.position + done)
            if count == 0:
                raise self._failure("the file ends in the middle of it")
            done += count
        self.position += done
        self.crc = zlib.crc32(data, self.crc)

    def _check_crc(self) -> None:
        if self.crc != self.expected_crc:
            raise self._failure(
                f"its checksum is {self.crc:08x}, {self.expected_crc:08x} was written"
            )

    def _failure(self, reason: str) -> StageFailure:
        return StageFailure(
            f"{self.shard.file}: the shard of {self.name} at {list(self.shard.start)} is damaged: {reason}. Use an earlier checkpoint."
        )


class _Slice(io.RawIOBase):
    """Bytes `offset` to `offset + length` of a file as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self._descriptor, self._offset, self._length, self._position = (
            file.fileno(),
            offset,
            length,
            0,
        )

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = (
            offset
            + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        )
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(0, self._length - self._position)]
        count = os.preadv(self._descriptor, [wanted], self._offset + self._position)
        self._position += count
        return count


def _stored_record(archive: BinaryIO) -> tuple[int, int, int]:
    """Where, in the archive that torch.save wrote, the bytes of its one storage begin, how many they are, and their CRC-32."""
    with zipfile.ZipFile(archive) as records:
        # A compressed record (torch.save writes none) can be a thousand times as large in memory.
        if any(
            info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size
            for info in records.infolist()
        ):
            raise zipfile.BadZipFile("its records are compressed")
        storages = [info for info in records.infolist() if info.filename.endswith("/data/0")]
        if len(storages) != 1:
            raise zipfile.BadZipFile("it holds no plain tensor")
        [record] = storages
        for info in records.infolist():
            if info is not record:
                records.read(
                    info
                )  # raises where its CRC-32 is not the one written: torch itself does not look
    archive.seek(record.header_offset)
    # APPNOTE.TXT 4.3.7: a local header is 30 bytes, its last four the lengths of the name and of the extra field that follow it.
    name_length, extra_length = struct.unpack("<26xHH", archive.read(30))
    archive.seek(0)
    return record.header_offset + 30 + name_length + extra_length, record.file_size, record.CRC
