"""Shards that differ from what train published: found before anything is published from them, and
named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from stages.backends.torch.checkpoint import trained_weights
from stages.backends.torch.lora import adapter_config, add_adapters, freeze
from stages.consolidate import join
from stages.run.errors import StageFailure
from stages.run.json_file import write_json
from stages.run.layout import ADAPTER_CONFIG
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings
from stages.text.prompt import TextFormat
from stages.text.tokens import TextTokenizer
from tests.conftest import ROOT
from tests.tiny_llama import tiny_llama
from tests.torture.checkpoints import resumed

pytestmark = [
    pytest.mark.torture("fuzz"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """What train publishes: the shards of a tiny Llama, its config, a tokenizer and a prompt."""

    def build(work: Path) -> StageResult:
        model = tiny_llama()
        model.config.save_pretrained(work)
        tokenizer = TextTokenizer.load(ROOT / "data/demo/model")
        tokenizer.save(work / "tokenizer")
        TextFormat(tokenizer).save(work)
        writer = HuggingFaceStorageWriter(str(work / "shards"), save_distributed=True)
        dcp.save(model.state_dict(), storage_writer=writer, no_dist=True)
        return StageResult()

    publish("train", Settings(), {}, tmp_path / "train", build)
    return tmp_path / "train"


def joined(train: Path) -> None:
    work = train.parent / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    join(replace(Settings(), bf16=False), train, work)


def test_shards_as_they_were_published_are_joined(train: Path) -> None:
    joined(train)


def replaced(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert len(old) == len(new) and old in data
    path.write_bytes(data.replace(old, new))


def layers_exchanged(shards: Path) -> None:
    """Two matrices of one shape under each other's names: only a digest can tell."""
    first, second = (f"model.layers.{number}.mlp.up_proj.weight".encode() for number in range(2))
    replaced(shards / SHARD, first, first.replace(b"up", b"xx"))
    replaced(shards / SHARD, second, first)
    replaced(shards / SHARD, first.replace(b"up", b"xx"), second)


def last_byte_flipped(shards: Path) -> None:
    data = bytearray((shards / SHARD).read_bytes())
    data[-4] ^= 1
    (shards / SHARD).write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "two layers exchanged": layers_exchanged,
    "a digit of a place": lambda shards: replaced(
        shards / SHARD, b'saved_offsets\\": [0, 0]', b'saved_offsets\\": [1, 0]'
    ),
    "a bit of a weight": last_byte_flipped,
    "zeros": lambda shards: (shards / SHARD).write_bytes(bytes((shards / SHARD).stat().st_size)),
    "a shard cut short": lambda shards: os.truncate(shards / SHARD, 10**4),
    "a file more": lambda shards: shutil.copy(
        shards / SHARD, shards / SHARD.replace("shard-00001", "shard-00002")
    ),
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


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
    max_examples=30,
)
@given(
    place=st.one_of(st.floats(0, 1, exclude_max=True), st.floats(0, 0.1)), byte=st.integers(0, 255)
)
def test_any_changed_byte_of_a_shard_is_found(train: Path, place: float, byte: int) -> None:
    intact = (train / "shards" / SHARD).read_bytes()
    data = bytearray(intact)
    data[int(place * len(data))] = byte
    if data == intact:
        return
    (train / "shards" / SHARD).write_bytes(data)
    try:
        with pytest.raises(StageFailure, match="has other bytes than were published"):
            joined(train)
    finally:
        (train / "shards" / SHARD).write_bytes(intact)


@pytest.fixture
def adapter(tmp_path: Path) -> Settings:
    """The settings to join what train publishes with LoRA, which is in run/train."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    shutil.copy(ROOT / "data/demo/model/tokenizer.json", base)
    changed = replace(
        Settings(), bf16=False, model_id=str(base), lora_r=2, lora_target_modules="q_proj"
    )

    def build(work: Path) -> StageResult:
        shutil.copy(base / "config.json", work)
        tokenizer = TextTokenizer.load(ROOT / "data/demo/model")
        tokenizer.save(work / "tokenizer")
        TextFormat(tokenizer).save(work)
        model = tiny_llama()
        add_adapters(model, changed)
        freeze(model)
        writer = HuggingFaceStorageWriter(str(work / "shards"), save_distributed=True)
        dcp.save(trained_weights(model), storage_writer=writer, no_dist=True)
        write_json(work / "shards" / ADAPTER_CONFIG, adapter_config(changed))
        return StageResult()

    publish("train", changed, {}, tmp_path / "run" / "train", build)
    return changed


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
    max_examples=20,
)
@given(
    name=st.sampled_from([SHARD, ADAPTER_CONFIG]),
    place=st.floats(0, 1, exclude_max=True),
    byte=st.integers(0, 255),
)
def test_any_changed_byte_of_an_adapter_is_found(
    adapter: Settings, tmp_path: Path, name: str, place: float, byte: int
) -> None:
    train, work = tmp_path / "run" / "train", tmp_path / "work"
    file = train / "shards" / name
    intact = file.read_bytes()
    data = bytearray(intact)
    data[int(place * len(data))] = byte
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    file.write_bytes(data)
    try:
        if data == intact:
            join(adapter, train, work)
        else:
            with pytest.raises(StageFailure, match="has other bytes than were published"):
                join(adapter, train, work)
    finally:
        file.write_bytes(intact)


def test_a_checkpoint_that_cannot_be_read_is_a_clear_failure(
    tmp_path: Path, one_rank: None
) -> None:
    """Its files have the digests in its list, and yet are not a checkpoint of this model."""
    from stages.backends.torch.checkpoint import save_checkpoint

    model = torch.nn.Linear(3, 1)
    save_checkpoint(tmp_path, 2, model, torch.optim.SGD(model.parameters()), keep=1)
    with pytest.raises(
        StageFailure,
        match=r"step-00000002 cannot be resumed from: .*Remove it and run `make train` again",
    ):
        resumed(tmp_path)
