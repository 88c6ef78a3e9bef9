"""The project's safetensors writer: a model's weights to disk without the model in memory.

Names, shapes and dtypes are known before the first byte is read, so the headers and the division
into files are fixed first. The tensors then pass through piece by piece: cast, checked, written,
hashed. Every backend writes its weights here, so their folders look the same. The writer returns
the SHA-256 of each file, so that a manifest need not read the bytes again.

Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, the tensors back
to back).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import operator
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stages.model.files import INDEX_FILE as INDEX_FILE
from stages.model.files import SINGLE_FILE as SINGLE_FILE
from stages.run.disk import disk_guard
from stages.run.errors import StageFailure
from stages.run.progress import Progress

if TYPE_CHECKING:
    import torch

# torch's name of a dtype -> safetensors' code for it and the bytes of one element.
DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
DTYPE_NAMES = {code: name for name, (code, _) in DTYPES.items()}
FLOATING = ("float64", "float32", "float16", "bfloat16")

# The size of a piece: small enough to stay in a processor's cache from the read to the write, large
# enough for a disk.
PIECE_BYTES = 2 << 20
# Pieces that may wait to be checked, and to be hashed: threads on two cores take turns.
PIECES_AHEAD = 16
# Bytes after which the disk is given what is written.
FLUSH_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorSpec:
    """A file's header entry for one tensor. `dtype` is torch's name without the module:
    `bfloat16`."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPES[self.dtype][1]


# Reads one tensor: its elements in row-major order, in one or several CPU tensors of any shape.
# Called once, in order.
ReadTensor = Callable[[], "Iterable[torch.Tensor]"]
Pieces = Generator[tuple[TensorSpec, "torch.Tensor"], None, None]


def write_safetensors(
    tensors: Sequence[tuple[TensorSpec, ReadTensor]],
    folder: Path,
    *,
    max_shard_size: int,
    dtype: str | None = None,
) -> dict[str, str]:
    """Write `tensors` to the existing `folder` under the names that `save_pretrained` uses; return
    file name -> SHA-256 in hexadecimal.

    Floating tensors are cast to `dtype` if it is not None. No file, header included, is larger than
    `max_shard_size` bytes unless a single tensor is. Memory holds a few pieces of PIECE_BYTES, and
    one tensor from a reader where that is larger.

    Raises StageFailure, and removes its files, when a value is not finite, when a reader yields
    another number of elements than its spec has, or when a file cannot be read or written (a full
    disk). Other exceptions of a reader pass through.
    """
    unwritable = sorted({dtype or "float32", *(spec.dtype for spec, _ in tensors)} - set(DTYPES))
    if unwritable:
        raise StageFailure(
            f"Weights of dtype {', '.join(unwritable)} cannot be written. The writer "
            f"supports {', '.join(DTYPES)}."
        )
    outputs = [
        (replace(spec, dtype=dtype) if dtype and spec.dtype in FLOATING else spec, read)
        for spec, read in tensors
    ]
    total = sum(spec.nbytes for spec, _ in outputs)
    files = _divide(outputs, max_shard_size)
    digests: dict[str, str] = {}
    try:
        with (
            disk_guard("the weights", folder, total),
            Progress("weights", total=total, unit="bytes") as bar,
        ):
            for name, contents in files.items():
                digests[name] = _write_file(folder / name, contents, bar)
        if len(files) > 1:
            index = _index(files, total)
            (folder / INDEX_FILE).write_bytes(index)
            digests[INDEX_FILE] = hashlib.sha256(index).hexdigest()
    except BaseException as error:
        for name in (*files, INDEX_FILE):
            (folder / name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StageFailure(f"Writing the weights to {folder} stopped: {error}.") from error
        raise
    return digests


def _index(files: dict[str, list[tuple[TensorSpec, ReadTensor]]], total: int) -> bytes:
    """model.safetensors.index.json: which file holds which tensor, `total` bytes in all."""
    index = {
        "metadata": {"total_size": total},
        "weight_map": {spec.name: name for name, contents in files.items() for spec, _ in contents},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _divide(
    tensors: list[tuple[TensorSpec, ReadTensor]], max_shard_size: int
) -> dict[str, list[tuple[TensorSpec, ReadTensor]]]:
    """File name -> its tensors, filled in order as huggingface_hub does, but the header's bytes
    count too."""
    total = sum(spec.nbytes for spec, _ in tensors)
    overhead = len(_header([])) + 8  # 8: its padding
    groups: list[list[tuple[TensorSpec, ReadTensor]]] = [[]]
    size = overhead
    for spec, read in tensors:
        # No offset in any file has more digits than the total has.
        needed = spec.nbytes + len(json.dumps(_entry(spec, total, total))) + len(", ")
        if groups[-1] and size + needed > max_shard_size:
            groups.append([])
            size = overhead
        groups[-1].append((spec, read))
        size += needed
    count = len(groups)
    names = (
        [SINGLE_FILE]
        if count == 1
        else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    )
    # Wide elements first, so that every tensor starts at a multiple of its element's size. Readers
    # that map the file rely on that.
    return {
        name: sorted(group, key=lambda item: -DTYPES[item[0].dtype][1])
        for name, group in zip(names, groups, strict=True)
    }


def _entry(spec: TensorSpec, start: int, end: int) -> dict[str, dict[str, object]]:
    return {
        spec.name: {
            "dtype": DTYPES[spec.dtype][0],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    }


def _header(specs: Iterable[TensorSpec]) -> bytes:
    """Length and JSON of a file's header, padded with spaces to a multiple of 8 bytes as the format
    requires; transformers requires `format`."""
    entries: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        if spec.name in entries:
            raise StageFailure(f"Two tensors have the name {spec.name!r}.")
        entries |= _entry(spec, end, end + spec.nbytes)
        end += spec.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_file(path: Path, contents: list[tuple[TensorSpec, ReadTensor]], bar: Progress) -> str:
    """Write one safetensors file; return its SHA-256. Meanwhile a second thread hashes (which
    releases the interpreter's lock), and a third has the disk take what is written: publishing
    would wait for that."""
    digest = hashlib.sha256()
    with path.open("wb") as file, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as disk:
        hashing: deque[Future[None]] = deque()
        flushing = disk.submit(os.fdatasync, file.fileno())
        unflushed = 0
        for data in _file_bytes(contents):
            hashing.append(hasher.submit(digest.update, data))
            if len(hashing) > PIECES_AHEAD:
                hashing.popleft().result()
            file.write(data)
            unflushed += len(data)
            if unflushed > FLUSH_BYTES and flushing.done():
                flushing.result()
                flushing = disk.submit(os.fdatasync, file.fileno())
                unflushed = 0
            bar.update(len(data))
        for one in (*hashing, flushing):
            one.result()
    return digest.hexdigest()


def _file_bytes(contents: list[tuple[TensorSpec, ReadTensor]]) -> Iterator[bytes | memoryview]:
    """The file's bytes in order. Raises StageFailure at the end of a tensor with a value that is
    not finite."""
    import torch

    yield _header(spec for spec, _ in contents)
    with contextlib.closing(_read_ahead(_pieces(contents))) as pieces:
        for spec, group in itertools.groupby(pieces, key=operator.itemgetter(0)):
            bad_inputs, bad_outputs = 0, 0
            for _, piece in group:
                values = piece.to(getattr(torch, spec.dtype))
                if not _all_finite(values):
                    bad_inputs += _count_not_finite(piece)
                    bad_outputs += _count_not_finite(values)
                yield values.view(torch.uint8).numpy().data
            if bad_inputs:
                raise StageFailure(
                    f"{spec.name}: {bad_inputs} of {spec.elements} values are not finite."
                )
            if bad_outputs:
                too_large = (
                    f"{bad_outputs} of {spec.elements} values are beyond "
                    f"{torch.finfo(values.dtype).max:.4g}"
                )
                raise StageFailure(
                    f"{spec.name}: {too_large}, the largest number in {spec.dtype}. Use bfloat16 "
                    "or float32."
                )


def _pieces(contents: list[tuple[TensorSpec, ReadTensor]]) -> Pieces:
    """The pieces of all tensors in order, flat and at most PIECE_BYTES each."""
    for spec, read in contents:
        elements = 0
        for tensor in read():
            elements += tensor.numel()
            flat = tensor.detach().reshape(-1)
            for piece in flat.split(max(1, PIECE_BYTES // flat.element_size())):
                if piece.numel():  # split() gives one empty piece of an empty tensor
                    yield spec, piece if len(piece) == len(flat) else piece.clone()
            # No local variable, and no piece that waits to be hashed, may keep a large tensor alive
            # while the next one is read.
            del tensor, flat, piece
        if elements != spec.elements:
            raise StageFailure(
                f"{spec.name}: {elements} values were read, its shape {list(spec.shape)} has "
                f"{spec.elements}."
            )


def _read_ahead(pieces: Pieces) -> Pieces:
    """The same pieces; a second thread reads the next ones while the caller uses this one."""
    with ThreadPoolExecutor(1) as pool:
        reading = deque(pool.submit(next, pieces, None) for _ in range(PIECES_AHEAD))
        while (piece := reading.popleft().result()) is not None:
            reading.append(pool.submit(next, pieces, None))
            yield piece


def _all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. min and max propagate NaN, and take a twentieth of the
    time of isfinite().all() on a CPU."""
    if not values.is_floating_point():
        return True
    return all(math.isfinite(extreme) for extreme in values.aminmax())


def _count_not_finite(values: torch.Tensor) -> int:
    return int(values.isfinite().logical_not().sum())
