"""The shards that NeuronTrainer.save_model leaves: which files belong to them, what is wrong with
them, and the tensors that they make up.

    shards/  done  mp_metadata_pp_rank_PP.json  [adapter_config.json]
             model/dp_rank_00_tp_rank_TT_pp_rank_PP.pt
             with use_xser also  model/...pt.info.pt (shapes and dtypes)
                                 model/...pt.tensors/tensor_K.pt (one per tensor)

Names, shapes and dtypes of all tensors are known from the metadata and from the files' descriptions
of their tensors; the weights are read afterwards, a few rows at a time.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.backends.neuron.shards.metadata import parse_metadata
from stages.backends.neuron.shards.sharded_tensor import Part, ShardedTensor
from stages.backends.neuron.shards.torch_archive import (
    StoredTensor,
    TensorReference,
    damage,
    mapped_at,
    read_archive,
)
from stages.backends.neuron.shards.unshard import (
    Misfit,
    Original,
    Partition,
    Spec,
    original_tensors,
)
from stages.model.weights import DTYPES, TensorSpec
from stages.run.errors import StageFailure
from stages.run.layout import ADAPTER_CONFIG

DONE = "done"
MOST_RANKS = 4096
METADATA = "mp_metadata_pp_rank_{}.json"
RANK_FILE = "dp_rank_00_tp_rank_{:02d}_pp_rank_{:02d}.pt"


@dataclass
class Shards:
    """What a folder of shards holds."""

    folder: Path
    tensors: dict[str, ShardedTensor] = field(default_factory=dict)
    # Names that the metadata lacks (a tied parameter is listed under one of its names) -> the shard
    # of each rank.
    unlisted: dict[str, list[StoredTensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def adapter(self) -> bool:
        return (self.folder / ADAPTER_CONFIG).is_file()


@dataclass(frozen=True)
class _PipelineRank:
    """One pipeline-parallel rank: its metadata and the file of each of its tensor-parallel
    ranks."""

    metadata: Path
    parameters: dict[str, Partition | None]
    specs: list[Spec]
    files: list[Path]


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds a save that was finished, with a file of every rank. Reads only the
    metadata."""
    return not _pipeline_ranks(folder)[1]


def problems(folder: Path) -> list[str]:
    """All that can be seen to be wrong with the shards without reading a weight."""
    return read_shards(folder).problems


def damaged(folder: Path) -> str:
    """Why the shards, all of which are read, are not as they were written; empty where they are."""
    reasons = (damage(path) for path in sorted((folder / "model").rglob("*.pt")) if path.is_file())
    return next(filter(None, reasons), "") or "; ".join(problems(folder)[:1])


def read_shards(folder: Path) -> Shards:
    """The tensors in `folder` under the names of the original model; all that is wrong is in
    `problems`."""
    ranks, found = _pipeline_ranks(folder)
    shards = Shards(folder, problems=found)
    if not found:
        for rank in ranks:
            _read_pipeline_rank(rank, shards)
        if not shards.tensors and not shards.problems:
            shards.problems.append(f"{folder} holds no tensors.")
    return shards


def _pipeline_ranks(folder: Path) -> tuple[list[_PipelineRank], list[str]]:
    if not (folder / DONE).is_file():
        return [], [
            f"{folder / DONE} is missing. It is written after all weights, so this save was "
            "never finished."
        ]
    pipeline_ranks, problems = [], []
    if _pipeline_size(folder) > MOST_RANKS:
        return [], [
            f"{folder} has files of {_pipeline_size(folder)} pipeline ranks; no training has "
            f"more than {MOST_RANKS}."
        ]
    for rank in range(_pipeline_size(folder)):
        path = folder / METADATA.format(rank)
        try:
            parameters, specs = parse_metadata(json.loads(path.read_text()))
        except FileNotFoundError:
            problems.append(f"{path} is missing.")
            continue
        except (Misfit, ValueError, RecursionError) as error:
            problems.append(f"{path} cannot be used: {error}.")
            continue
        sizes = {partition.count for partition in parameters.values() if partition} | {
            spec.tp_size for spec in specs
        } or {1}
        if max(sizes) > MOST_RANKS:
            problems.append(
                f"{path} gives {max(sizes)} tensor-parallel ranks; no training has more than "
                f"{MOST_RANKS}."
            )
            continue
        files = [
            folder / "model" / RANK_FILE.format(tensor_rank, rank)
            for tensor_rank in range(max(sizes))
        ]
        problems += [f"{file} is missing." for file in files if not file.is_file()]
        if len(sizes) > 1:
            problems.append(f"{path} gives several tensor-parallel sizes: {sorted(sizes)}.")
        pipeline_ranks.append(_PipelineRank(path, parameters, specs, files))
    return pipeline_ranks, problems


def _pipeline_size(folder: Path) -> int:
    """The number of pipeline ranks, by the highest one of which anything is there."""
    names = [path.name for pattern in ("*.json", "model/*.pt") for path in folder.glob(pattern)]
    return 1 + max(
        (
            int(match[1])
            for name in names
            if (match := re.search(r"_pp_rank_(\d+)\.(?:json|pt)$", name))
        ),
        default=0,
    )


def _read_pipeline_rank(pipeline_rank: _PipelineRank, shards: Shards) -> None:
    """Add its tensors, or its problems, to `shards`."""
    ranks: list[dict[str, StoredTensor]] = []
    for file in pipeline_rank.files:
        try:
            ranks.append(_rank_tensors(file, shards.problems))
        except StageFailure as failure:
            shards.problems.append(str(failure))
    if len(ranks) < len(pipeline_rank.files) or shards.problems:
        return
    if not shards.adapter and any(".lora_" in name for tensors in ranks for name in tensors):
        shards.problems.append(
            f"{shards.folder / ADAPTER_CONFIG} is missing, and the shards hold an adapter. Copy "
            "it there."
        )
        return
    for name in {name: None for tensors in ranks for name in tensors} | (
        {} if shards.adapter else pipeline_rank.parameters
    ):
        lacking = [
            file.name
            for file, tensors in zip(pipeline_rank.files, ranks, strict=True)
            if name not in tensors
        ]
        if lacking and (name in pipeline_rank.parameters or len(lacking) < len(ranks)):
            shards.problems.append(
                f"{shards.folder / 'model'}: {name} is missing in {', '.join(lacking)}."
            )
    if shards.problems:
        return
    stored = {name: [tensors[name] for tensors in ranks] for name in ranks[0]}
    for name, pieces in stored.items():
        if len({piece.dtype for piece in pieces}) > 1:
            shards.problems.append(
                f"{shards.folder / 'model'}: the ranks' shards of {name} differ in dtype."
            )
    shapes = {name: [piece.shape for piece in pieces] for name, pieces in stored.items()}
    originals, misfits = original_tensors(pipeline_rank.parameters, pipeline_rank.specs, shapes)
    shards.problems += [f"{pipeline_rank.metadata}: {misfit}." for misfit in misfits]
    used = {original.parameter for original in originals}
    shards.unlisted |= {name: pieces for name, pieces in stored.items() if name not in used}
    for original in originals:
        if original.name in shards.tensors:
            shards.problems.append(
                f"{pipeline_rank.metadata}: {original.name} is on another pipeline rank too."
            )
        shards.tensors[original.name] = _sharded_tensor(original, stored[original.parameter])


def _sharded_tensor(original: Original, stored: list[StoredTensor]) -> ShardedTensor:
    shape = list(stored[0].shape)
    shape[original.dimension] = sum(piece.length for piece in original.slices)
    parts = tuple(Part(stored[piece.rank], piece.start, piece.length) for piece in original.slices)
    return ShardedTensor(
        TensorSpec(original.name, tuple(shape), stored[0].dtype), original.dimension, parts
    )


def _rank_tensors(file: Path, problems: list[str]) -> dict[str, StoredTensor]:
    """Name -> tensor for one rank's file and the files it refers to. Problems of the latter are
    added to `problems`."""
    entries = read_archive(file)
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise StageFailure(f"{file} holds no state dict.")
    info_file = file.with_name(f"{file.name}.info.pt")
    information = read_archive(info_file) if info_file.is_file() else {}
    if not isinstance(information, dict):
        raise StageFailure(f"{info_file} does not list tensors.")
    tensors = {}
    mapped = _mapped_at(file, entries.values())
    for name, entry in entries.items():
        try:
            if isinstance(entry, TensorReference):
                stored = _referred(file, getattr(entry, "tid", None), information)
            else:
                stored = _stored(file, name, entry, mapped)
        except StageFailure as failure:
            problems.append(
                f"{failure} It holds {name}."
                if isinstance(entry, TensorReference)
                else str(failure)
            )
            continue
        if stored:
            tensors[name] = stored
    return tensors


def _mapped_at(file: Path, values: Iterable[object]) -> int | None:
    import torch

    return mapped_at(file, [value for value in values if isinstance(value, torch.Tensor)])


def _stored(file: Path, name: str | None, value: object, mapped: int | None) -> StoredTensor | None:
    """A tensor that was read from `file`, which is mapped from that address on, by its place; None
    for one without data (another pipeline rank's)."""
    import torch

    if (
        not isinstance(value, torch.Tensor)
        or (dtype := str(value.dtype).removeprefix("torch.")) not in DTYPES
    ):
        raise StageFailure(
            f"{file}: its entry {name} is not a tensor." if name else f"{file} holds no tensor."
        )
    if value.is_meta:
        return None
    offset = None
    if mapped is not None and value.is_contiguous():
        offset = value.data_ptr() - mapped
    return StoredTensor(file, name, dtype, tuple(value.shape), offset)


def _referred(file: Path, number: object, information: dict[Any, Any]) -> StoredTensor | None:
    """The tensor in a file of its own, if it is as info.pt says (old versions of
    neuronx-distributed wrote no info.pt)."""
    if not isinstance(number, int):
        raise StageFailure(
            f"{file} refers to a tensor {reprlib.repr(number)}, and not by a number."
        )
    path = file.with_name(f"{file.name}.tensors") / f"tensor_{number}.pt"
    if not path.is_file():
        raise StageFailure(f"{path} is missing.")
    value = read_archive(path)
    stored = _stored(path, None, value, _mapped_at(path, [value]))
    described = information.get(number)
    if stored and isinstance(described, dict):
        expected = (
            str(described.get("dtype")).removeprefix("torch."),
            tuple(described.get("shape", ())),
        )
        if expected != (stored.dtype, stored.shape):
            raise StageFailure(
                f"{path} holds {stored.dtype} {stored.shape}, {file.name}.info.pt says "
                f"{expected[0]} {expected[1]}."
            )
    return stored
