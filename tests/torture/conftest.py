"""A checkpoint and a model, and copies of them to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch.distributed.checkpoint as dcp

    from tests.torture.shard_damage import STATE

    folder = tmp_path_factory.mktemp("checkpoint") / "shards"
    dcp.save({"model": STATE, "optimizer": {"lr": 0.1}}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def shards(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage; what a pickle runs would leave a file in the working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return shutil.copytree(checkpoint, tmp_path / "shards")


@pytest.fixture
def no_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process of a training that starts is a failure. Models that are made go to a folder of the test's own."""

    def started(*_: object) -> None:
        raise AssertionError("a process of the training was started")

    from stages.backends.torch import train
    from stages.model import base

    monkeypatch.setattr(train, "launch", started)
    monkeypatch.setattr(base, "MADE_MODELS", tmp_path / "made")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama in the Hugging Face layout."""
    from tests.tiny_llama import tiny_llama

    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"
