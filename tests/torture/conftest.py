"""A checkpoint and a model, and copies of them to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.torture.checkpoints import one_rank  # noqa: F401 (a fixture)


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
