"""Shards that are whole, each for itself, and yet not what train published; and checkpoints of a training that were made to do harm."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from stages.backends.torch.metadata import METADATA_FILE
from stages.backends.torch.reader import load_checkpoint
from stages.consolidate import join
from stages.run.errors import StageFailure
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings
from tests.pickled import Call
from tests.tiny_llama import tiny_llama
from tests.torture.shard_damage import SHARD, change

pytestmark = [
    pytest.mark.torture("fuzz"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What train publishes: the shards of a tiny Llama in two files, its config, a tokenizer and a prompt."""

    def build(work: Path) -> StageResult:
        model = tiny_llama()
        model.config.save_pretrained(work)
        (work / "tokenizer").mkdir()
        (work / "prompt.json").write_text("{}")
        dcp.save({"model": model.state_dict()}, checkpoint_id=work / "shards", no_dist=True)
        return StageResult(unkeyed=("shards/.metadata",))

    publish("train", Settings(), {}, tmp_path / "train", build)
    return tmp_path / "train"


def joined(train: Path) -> None:
    work = train.parent / "work"
    work.mkdir()
    join(replace(Settings(), bf16=False), train, work)


def test_shards_as_they_were_published_are_joined(train: Path) -> None:
    joined(train)


def layers_exchanged(shards: Path) -> None:
    """Two matrices of one shape: each is whole, and has the other's place."""
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(2)]
    found = pickle.loads((shards / METADATA_FILE).read_bytes())
    places = {
        index.fqn.removeprefix("model."): place for index, place in found.storage_data.items()
    }
    for name, other in (names, reversed(names)):
        change(shards, name, offset=places[other].offset, length=places[other].length)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "two layers exchanged": layers_exchanged,
    "a byte of the metadata": lambda shards: (shards / METADATA_FILE).write_bytes(
        (shards / METADATA_FILE).read_bytes() + b"."
    ),
    "a byte of a shard": lambda shards: os.truncate(shards / SHARD, 10**7),
    "a file more": lambda shards: shutil.copy(shards / SHARD, shards / "__1_0.distcp"),
    "a file less": lambda shards: (shards / SHARD).unlink(),
    "a link in the place of a file": lambda shards: (
        (shards / SHARD).rename(shards.parents[1] / SHARD),
        (shards / SHARD).symlink_to(f"../../{SHARD}"),
    ),
    "no manifest": lambda shards: (shards.parent / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_shards_other_than_those_that_were_published_are_not_joined(
    train: Path, damage: Callable[[Path], object]
) -> None:
    damage(train / "shards")
    with pytest.raises(StageFailure, match=r"Run `make train"):
        joined(train)


def resumed(folder: Path) -> dict:
    state = {"model": {"w": torch.zeros(3)}, "optimizer": {"lr": 0.0, "betas": (0.0, 0.0)}}
    load_checkpoint(folder, state)
    return state


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    state = {"model": {"w": torch.arange(3.0)}, "optimizer": {"lr": 0.1, "betas": (0.9, 0.95)}}
    dcp.save(state, checkpoint_id=tmp_path / "step", no_dist=True)
    return tmp_path / "step"


def test_a_checkpoint_is_resumed_with_its_numbers(checkpoint: Path) -> None:
    state = resumed(checkpoint)
    assert torch.equal(state["model"]["w"], torch.arange(3.0))
    assert state["optimizer"] == {"lr": 0.1, "betas": (0.9, 0.95)}


@pytest.mark.parametrize("place", ["the metadata", "a number"])
def test_a_checkpoint_with_a_command_in_it_is_not_resumed_and_nothing_runs(
    checkpoint: Path, place: str
) -> None:
    command = Call(os.system, "touch ran")
    if place == "the metadata":
        (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(command))
    else:
        shutil.rmtree(checkpoint)
        state = {
            "model": {"w": torch.arange(3.0)},
            "optimizer": {"lr": command, "betas": (0.9, 0.95)},
        }
        dcp.save(state, checkpoint_id=checkpoint, no_dist=True)
    with pytest.raises(StageFailure, match=r"cannot be resumed from"):
        resumed(checkpoint)
    assert not list(Path().iterdir())


def test_a_checkpoint_that_names_a_file_elsewhere_is_not_resumed(checkpoint: Path) -> None:
    shutil.copy(checkpoint / SHARD, checkpoint.parent / "outside")
    change(checkpoint, "w", relative_path="../outside")
    with pytest.raises(StageFailure, match="is not one of the checkpoint's own"):
        resumed(checkpoint)
