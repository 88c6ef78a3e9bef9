"""Joins the shards that train published into whole tensors and writes them as safetensors.

Each rank's files are plain safetensors, written by torch.distributed.checkpoint (DCP); the entry
DCP_SHARDING_INFO of a header says where in the whole tensor each part begins. DCP's own join
(consolidate_safetensors_files) needs up to three times the largest tensor in memory and cannot
cast, so here the parts pass through in blocks of rows of about 2 MB. Each file is read once and
hashed on the way.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stages.backends.hashed_file import HashedFile
from stages.model.adapter import merged_tensors, write_adapter
from stages.model.check import untied
from stages.model.weights import DTYPE_NAMES, PIECE_BYTES, ReadTensor, TensorSpec, write_safetensors
from stages.run.contract import Consolidated
from stages.run.errors import StageFailure, refusal
from stages.run.layout import ADAPTER_CONFIG


class ShardFile(HashedFile):
    """A file of one rank: a JSON header, then the parts back to back."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            length = path.stat().st_size
            size = int.from_bytes(self.read(min(8, length), 0), "little")
            if size > length:
                raise ValueError(f"its header would have {size:,} bytes")
            self.header: dict[str, Any] = json.loads(self.read(size, 8))
            self.offsets: dict[str, Any] = json.loads(
                self.header.pop("__metadata__")["DCP_SHARDING_INFO"]
            )
        except (ValueError, LookupError, TypeError) as error:
            raise StageFailure(f"{path} is not a shard, or is damaged: {error}.") from error
        self.data_start = 8 + size


@dataclass(frozen=True)
class Part:
    """One rank's box of a tensor: `shape` elements from `start` on. Its bytes begin at `offset` of
    the file."""

    file: ShardFile
    offset: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def consolidate(
    shards: Path,
    output: Path,
    *,
    dtype: str | None,
    max_shard_size: int,
    tied: Mapping[str, str] | None = None,
    base: Path | None = None,
) -> Consolidated:
    """Write the model in the folder `shards` to the existing folder `output` as safetensors.

    Floating tensors are cast to `dtype` (None: as they were trained). `tied` gives, for each name
    that is the same parameter as another, that other (`lm_head.weight` ->
    `model.embed_tokens.weight`): train publishes it only if training untied the two, and that is
    refused. `base` is the folder of the model that an adapter was trained on.

    Returns tensors and parameters (how many are written), bytes_read, files (name -> SHA-256 of
    what is written) and shards (name -> SHA-256 of what was read; the caller compares them with
    train's manifest). Raises StageFailure, with nothing in `output`, for shards that do not make up
    whole tensors and for a value that is not finite.
    """
    files = [ShardFile(path) for path in sorted(shards.glob("*.safetensors"))]
    parts = _parts(files)
    for name, kept in (tied or {}).items():
        if name in parts:
            raise untied(name, kept)
    specs = {name: _spec(name, boxes) for name, boxes in parts.items()}
    _require_whole(shards, specs, parts)
    sources: list[tuple[TensorSpec, ReadTensor]] = [
        (spec, partial(_read, spec, parts[name])) for name, spec in specs.items()
    ]
    bytes_read = sum(spec.nbytes for spec in specs.values())
    if is_adapter := (shards / ADAPTER_CONFIG).is_file():
        adapter = {spec.name: torch.cat(list(read())) for spec, read in sources}
        sources, base_bytes = merged_tensors(adapter, shards, base, dtype, tied or {})
        bytes_read += base_bytes
    digests = write_safetensors(sources, output, max_shard_size=max_shard_size, dtype=dtype)
    if is_adapter:
        write_adapter(adapter, shards, output)
    return {
        "tensors": len(sources),
        "parameters": sum(spec.elements for spec, _ in sources),
        "bytes_read": bytes_read,
        "files": digests,
        "shards": {file.path.name: file.sha256() for file in files},
    }


def _parts(files: list[ShardFile]) -> dict[str, list[Part]]:
    """Tensor -> its parts, in the order of the names: DCP writes the files in it."""
    parts: dict[str, list[Part]] = {}
    for file in files:
        for name, entry in file.header.items():
            start = tuple(file.offsets[name]["saved_offsets"])
            part = Part(
                file,
                file.data_start + entry["data_offsets"][0],
                start,
                tuple(entry["shape"]),
                DTYPE_NAMES[entry["dtype"]],
            )
            parts.setdefault(name, []).append(part)
    return dict(sorted(parts.items()))


def _spec(name: str, parts: list[Part]) -> TensorSpec:
    ends = [map(sum, zip(part.start, part.shape, strict=True)) for part in parts if part.elements]
    return TensorSpec(name, tuple(map(max, zip(*ends, strict=True))), parts[0].dtype)


def _require_whole(
    shards: Path, specs: Mapping[str, TensorSpec], parts: Mapping[str, list[Part]]
) -> None:
    problems = [
        f"{name}: its shards ({elements} values) do not cover its shape {list(spec.shape)} "
        "exactly once."
        for name, spec in specs.items()
        if (elements := sum(part.elements for part in parts[name])) != spec.elements
    ]
    if problems or not specs:
        raise refusal(
            f"The shards {shards} are not a whole model. Run `make train` again.", problems
        )


def _read(spec: TensorSpec, parts: list[Part]) -> Iterator[torch.Tensor]:
    """The whole tensor in blocks of rows (its first dimension) of about PIECE_BYTES."""
    total, *others = spec.shape
    rows = max(1, PIECE_BYTES * total // max(1, spec.nbytes))
    for first in range(0, total, rows):
        block = torch.empty(min(rows, total - first), *others, dtype=getattr(torch, spec.dtype))
        for part in parts:
            _copy_rows(part, block, first)
        yield block


def _copy_rows(part: Part, block: torch.Tensor, first: int) -> None:
    """Copy the rows that `part` has of `block`, which begins at the tensor's row `first`."""
    begin, end = max(part.start[0], first), min(part.start[0] + part.shape[0], first + len(block))
    if begin >= end:
        return
    box = block[begin - first : end - first]
    for dimension, (start, size) in itertools.islice(
        enumerate(zip(part.start, part.shape, strict=True)), 1, None
    ):
        box = box.narrow(dimension, start, size)
    rows = box if box.is_contiguous() else torch.empty(box.shape, dtype=box.dtype)
    skipped = (begin - part.start[0]) * math.prod(part.shape[1:]) * box.element_size()
    part.file.read_into(rows.view(-1).view(torch.uint8).numpy().data, part.offset + skipped)
    if rows is not box:
        box.copy_(rows)
