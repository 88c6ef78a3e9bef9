"""A small training of the torch backend: its settings, its data and the shards that it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.data import pack
from stages.run.settings import Settings
from tests.conftest import copy_project

STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a two-layer model with grouped heads and tied embeddings, on 20 of the demo's
    rows."""
    folder = copy_project(tmp_path_factory.mktemp("train") / "project").folder / "data" / "tiny"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    return Settings(
        model_id=str(folder),
        init_weights="random",
        dataset=str(folder / "rows.jsonl"),
        max_length=64,
        inference_sequence_length=64,
        validation_fraction=0.2,
        max_steps=STEPS,
        learning_rate=3e-3,
        warmup_steps=2,
        bf16=False,
        logging_steps=1,
        save_steps=0,
        eval_steps=3,
    )


@pytest.fixture(scope="module")
def data(base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack_with_metrics(base, folder)
    return folder


def pack_with_metrics(settings: Settings, folder: Path) -> dict[str, Any]:
    """Pack the settings' data in `folder`, beside as much of a manifest as a training reads, the
    metrics, which are returned."""
    facts = pack(settings, folder)
    (folder / "manifest.json").write_text(json.dumps({"metrics": facts.metrics}))
    return facts.metrics


def small_rehearsal(base: Settings, steps: int) -> Settings:
    """Settings of a rehearsal on sequences of more than one document."""
    return replace(base, max_steps=steps, warmup_steps=0, eval_steps=0, max_length=192)


def shards(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (work / "shards").iterdir()}
