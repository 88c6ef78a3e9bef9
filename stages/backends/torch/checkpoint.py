"""Checkpoints to resume from, and the shards that training hands on, with torch.distributed.checkpoint (DCP).

A checkpoint is written beside its place and renamed when every rank has written its part: a folder with the final
name is whole. Each tensor is stored once, in pieces that any later layout of processes can read.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict


def save_checkpoint(folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Write `folder/step-N` with weights and optimizer state, then remove all but the last `keep`."""
    weights, moments = get_state_dict(model, optimizer)
    _write(folder / f"step-{step:08d}", {"model": weights, "optimizer": moments})
    if dist.get_rank() == 0:
        for old in _whole(folder)[:-keep]:
            shutil.rmtree(old)


def resume(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the last whole checkpoint into model and optimizer; returns its step, 0 where there is none."""
    step = last_step(folder)
    if not step:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=_whole(folder)[-1])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return step


def save_shards(folder: Path, model: torch.nn.Module) -> None:
    """Write the trained weights alone: float32, under their Hugging Face names with the prefix `model.`."""
    _write(folder, {"model": get_model_state_dict(model)})


def last_step(folder: Path) -> int:
    """The step of the last whole checkpoint in `folder`, 0 where there is none."""
    found = _whole(folder)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def _whole(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def _write(folder: Path, state: dict[str, Any]) -> None:
    beside = folder.with_name(f"{folder.name}.writing")
    if dist.get_rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    dcp.save(state, checkpoint_id=beside)
    dist.barrier()
    if dist.get_rank() == 0:
        beside.rename(folder)
    dist.barrier()
