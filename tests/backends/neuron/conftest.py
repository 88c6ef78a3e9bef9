"""Shards that optimum-neuron's own classes wrote, once for all tests, and a compile cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.run.fingerprint import ROOT
from tests.fakes.neuron_cache import COMPILER, graph


@pytest.fixture(scope="session")
def written_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each of nxd_shards.LAYOUTS. Tests copy what they change."""
    folder = tmp_path_factory.mktemp("neuron")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakes.nxd_shards", str(folder)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """One graph in each state, and the other files of a cache."""
    root = tmp_path / "cache"
    graph(root, "1+aa", model_neff="compiled", model_done="")
    graph(root, "2+aa", model_log="out of memory")
    graph(root, "3+aa", model_hlo_module_pb_lock="")
    graph(root, "4+aa")
    (root / "0_REGISTRY").mkdir()
    (root / COMPILER / "a file").touch()
    return root
