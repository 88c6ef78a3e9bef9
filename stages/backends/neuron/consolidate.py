"""Joins the shards that NeuronTrainer.save_model left into whole tensors, on any machine, and
writes them as safetensors.

optimum-neuron's own join keeps the whole model in memory twice, needs the Neuron packages and,
above 5 GB, gives all files one name, so that only the last survives. Here the shards are read a few
megabytes at a time. An adapter is merged into its base model on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.backends.neuron.shards.read import Shards, read_shards
from stages.backends.neuron.shards.sharded_tensor import ShardedTensor
from stages.backends.neuron.shards.torch_archive import RowReader
from stages.model.adapter import merged_tensors, write_adapter
from stages.model.check import untied
from stages.model.weights import ReadTensor, TensorSpec, write_safetensors
from stages.run.contract import Consolidated
from stages.run.errors import StageFailure, refusal

if TYPE_CHECKING:
    import torch


def consolidate(
    shards: Path,
    output: Path,
    *,
    dtype: str | None,
    max_shard_size: int,
    tied: Mapping[str, str] | None = None,
    base: Path | None = None,
) -> Consolidated:
    """Write the model in the folder `shards` to the existing folder `output` as safetensors, cast
    to `dtype` (None: as it was trained).

    `tied` gives, for each name that is the same parameter as another, that other (`lm_head.weight`
    -> `model.embed_tokens.weight`): it is left out, as save_pretrained does. `base` is the folder
    of the model that an adapter was trained on; shards with an adapter need it.

    Returns tensors and parameters (how many were written), bytes_read, and files (name -> SHA-256).
    Raises StageFailure, with nothing left in `output`, for shards that are missing, cut short,
    damaged or do not fit their metadata, for a value that is not finite, for tied parameters that
    are not equal (training lost the tie, and dropping one would change the model), and for an
    adapter that does not fit `base`.
    """
    found = read_shards(shards)
    if found.problems:
        raise refusal(
            f"The shards {shards} cannot be joined; use an earlier checkpoint.", found.problems
        )
    reader = RowReader()
    if found.adapter:
        adapter = _adapter(found, reader)
        sources, base_bytes = merged_tensors(adapter, shards, base, dtype, tied or {})
    else:
        sources, base_bytes = _whole_model(found, reader, tied or {}), 0
    digests = write_safetensors(sources, output, max_shard_size=max_shard_size, dtype=dtype)
    if found.adapter:
        write_adapter(adapter, shards, output)
    return {
        "tensors": len(sources),
        "parameters": sum(spec.elements for spec, _ in sources),
        "bytes_read": reader.bytes_read + base_bytes,
        "files": digests,
        "shards": reader.digests(shards),
    }


def _adapter(shards: Shards, reader: RowReader) -> dict[str, torch.Tensor]:
    import torch

    if shards.unlisted:
        raise refusal(
            f"The shards {shards.folder} cannot be joined.",
            [f"{name} is not in the metadata of the shards." for name in shards.unlisted],
        )
    return {name: torch.cat(list(tensor.read(reader))) for name, tensor in shards.tensors.items()}


def _whole_model(
    shards: Shards, reader: RowReader, tied: Mapping[str, str]
) -> list[tuple[TensorSpec, ReadTensor]]:
    tensors = dict(shards.tensors)
    for name, kept in tied.items():
        if kept in tensors:
            _check_tie(_tied_tensor(shards, name, kept), tensors[kept], reader)
            tensors.pop(name, None)
    return [(tensor.spec, partial(tensor.read, reader)) for tensor in tensors.values()]


def _tied_tensor(shards: Shards, name: str, kept: str) -> ShardedTensor | None:
    """The parameter `name`, which the metadata lists only where it is not the same object as `kept`
    and else is cut as that is.

    In a pipeline each rank saves the other stages' tensors too, as they were before training; they
    are not listed, and not meant.
    """
    stored = shards.unlisted.get(name)
    if name in shards.tensors or stored is None:
        return shards.tensors.get(name)
    listed = shards.tensors[kept]
    if len(stored) != len(listed.parts):
        raise StageFailure(
            f"{shards.folder}: {name} has {len(stored)} shards, {kept}, which it is tied to, has "
            f"{len(listed.parts)}."
        )
    parts = tuple(
        replace(part, stored=piece) for part, piece in zip(listed.parts, stored, strict=True)
    )
    return replace(listed, spec=replace(listed.spec, name=name), parts=parts)


def _check_tie(tensor: ShardedTensor | None, kept: ShardedTensor, reader: RowReader) -> None:
    import torch

    if tensor is None:  # it was saved once
        return
    same = (tensor.spec.shape, tensor.spec.dtype) == (kept.spec.shape, kept.spec.dtype)
    same = same and [part.stored.shape for part in tensor.parts] == [
        part.stored.shape for part in kept.parts
    ]
    if same:
        same = all(
            torch.equal(a, b) for a, b in zip(tensor.read(reader), kept.read(reader), strict=True)
        )
    if not same:
        raise untied(tensor.spec.name, kept.spec.name)
