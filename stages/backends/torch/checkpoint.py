"""Checkpoints to resume from, and the shards that train publishes, with
torch.distributed.checkpoint (DCP).

Both are written into a temporary folder, flushed to the disk, and renamed when every rank has
written its part. A checkpoint is in DCP's own format and lists its files with their digests, so
that damage is found before a training resumes from it. The shards are plain safetensors files of
each rank. Each tensor is stored once, in parts that any later layout of processes can read.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from stages.backends.torch.checkpoint_damage import LIST, agreed, damage, facts_of
from stages.run.disk import disk_guard
from stages.run.errors import StageFailure
from stages.run.fsync import flush, fsync_tree, make_durable_folder
from stages.run.json_file import write_json

# A shard is put together in memory, twice, before it is written: a rank writes its weights as files
# of about this size.
FILE_BYTES = 1 << 30
PARTIAL = StateDictOptions(strict=False)  # a state without the frozen weights


def save_checkpoint(
    folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, keep: int
) -> None:
    """Write `folder/step-N` with weights and optimizer state, then remove all but the last
    `keep`."""
    state = _state(model, optimizer)
    _write(folder / f"step-{step:08d}", state, checkpoint=True, more={})
    if dist.get_rank() == 0:
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)


def resume(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint that is as it was written into model and optimizer; returns its
    step, 0 where there is none.

    Damaged ones are named and removed: they are of no use, and would be taken for the newest when
    older ones are cleared away.
    """
    damaged = _remove_damaged(folder)
    step = last_step(folder)
    if damaged and dist.get_rank() == 0:
        print(
            "\n".join([*damaged, f"continuing from step {step}" if step else "starting again"]),
            file=sys.stderr,
            flush=True,
        )
    if not step:
        return 0
    state = _state(model, optimizer)
    _load(_checkpoints(folder)[-1], state)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=PARTIAL,
    )
    return step


def save_shards(
    folder: Path,
    model: torch.nn.Module,
    tied: Mapping[str, str],
    more: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Write only the trained weights, float32, under their Hugging Face names, and beside them
    `more`: file name -> what it holds as JSON.

    `tied` gives, for each name that is the same parameter as another, that other: it is left out
    while the two are equal.
    """
    weights = trained_weights(model)
    for name, kept in tied.items():
        if name in weights and _same(weights[name], weights[kept]):
            del weights[name]
    _write(folder, weights, checkpoint=False, more=more or {})


def trained_weights(model: torch.nn.Module) -> dict[str, Any]:
    """The weights that are trained, by name. The others are the base model's: neither checkpoints
    nor shards have them."""
    state = get_model_state_dict(model)
    frozen = {
        name.replace("_checkpoint_wrapped_module.", "")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    return {name: tensor for name, tensor in state.items() if name not in frozen}


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    # The weights first: that shards them again where a validation left them whole, and the
    # optimizer knows only the sharded ones.
    weights = trained_weights(model)
    return {"model": weights, "optimizer": get_optimizer_state_dict(model, optimizer)}


def last_step(folder: Path) -> int:
    """The step of the last checkpoint in `folder`, 0 where there is none."""
    found = _checkpoints(folder)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def _load(checkpoint: Path, state: dict[str, Any]) -> None:
    """Fill `state` from a checkpoint whose digests were checked. DCP unpickles its metadata:
    outputs/ is trusted."""
    try:
        dcp.load(state, checkpoint_id=checkpoint)
    except dcp.CheckpointException as error:  # not an Exception: nothing above would catch it
        reasons = sorted(
            {str(failure).partition("\n")[0] for failure, _ in error.failures.values()}
        )
        raise StageFailure(
            f"{checkpoint} cannot be resumed from: {'; '.join(reasons)}. Remove it and run `make "
            "train` again."
        ) from error


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors that are cut alike are equal on every rank."""
    local, other = (
        tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in (first, second)
    )
    equal = [False] * dist.get_world_size()
    dist.all_gather_object(equal, torch.equal(local, other))
    return all(equal)


def _file_numbers(weights: dict[str, Any]) -> dict[str, int]:
    """Tensor -> the number (from 1) of the file in which every rank writes its part of it."""
    numbers: dict[str, int] = {}
    end = 0
    for name, tensor in sorted(weights.items()):
        numbers[name] = 1 + end // (FILE_BYTES * dist.get_world_size())
        end += _bytes(tensor)
    return numbers


def _write(
    folder: Path, state: dict[str, Any], *, checkpoint: bool, more: Mapping[str, dict[str, Any]]
) -> None:
    writing = folder.with_name(f"{folder.name}.writing")
    if dist.get_rank() == 0:
        shutil.rmtree(writing, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        make_durable_folder(folder.parent)
    dist.barrier()
    writer = (
        None
        if checkpoint
        else HuggingFaceStorageWriter(str(writing), _file_numbers(state), save_distributed=True)
    )
    with disk_guard(folder.name, writing, _bytes(state)):
        try:
            dcp.save(state, checkpoint_id=writing, storage_writer=writer)
        except dcp.CheckpointException as error:  # not an Exception: nothing above would catch it
            raise RuntimeError(str(error)) from error
    dist.barrier()
    if not checkpoint and dist.get_rank() == 0:
        for path in writing.glob("*.safetensors"):
            _sort_metadata(path)
    files = facts_of(writing, sorted(path.name for path in writing.iterdir())) if checkpoint else {}
    if dist.get_rank() == 0:
        if checkpoint:  # train's manifest lists the shards
            more = {**more, LIST: files}
        for name, content in more.items():
            write_json(writing / name, content)
        fsync_tree(writing)
        writing.rename(folder)
        flush(folder.parent)
    dist.barrier()


def _sort_metadata(path: Path) -> None:
    """Put the entries of `__metadata__` in a safetensors file in order.

    The library keeps them in a hash map, so each process writes them in another order. One training
    is to give the same bytes each time, or consolidate would run again for nothing.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > size:  # then the library writes headers in another way than it does today
            raise StageFailure(f"{path} has a header that cannot be put in order.")
        file.seek(8)
        file.write(text.ljust(size))


def _bytes(state: Any) -> int:
    """Bytes of the tensors in a nested state, each counted whole, whatever part of it lies here."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(
        map(
            _bytes,
            state.values() if isinstance(state, dict) else state if isinstance(state, list) else (),
        )
    )


def _remove_damaged(folder: Path) -> list[str]:
    """Remove the checkpoints after the last whole one; returns what was wrong with each, the same
    on every rank."""
    said = []
    for name in agreed([path.name for path in reversed(_checkpoints(folder))]):
        wrong = damage(folder / name)
        if not wrong:
            break
        said.append(f"checkpoint {name} is damaged: {'; '.join(wrong)}")
        if dist.get_rank() == 0:
            shutil.rmtree(folder / name)
        dist.barrier()
    return said
