"""What of a model's folder makes a stage stale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stages.run.provenance import provenance_now
from stages.run.settings import Settings


def model_of(stage: str, folder: Path) -> str:
    settings = replace(Settings(), model_id=str(folder))
    return provenance_now(stage, settings, {}, None)[0]["settings"]["MODEL_ID"]


@pytest.fixture
def consolidated(tmp_path: Path) -> Path:
    """As consolidate publishes it."""
    folder = tmp_path / "consolidate"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "prompt.json", "manifest.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def with_checkpoint(folder: Path) -> None:
    (folder / "checkpoint-5").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / "checkpoint-5" / name).write_text("other")


def write(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("other")


@pytest.mark.parametrize("stage", ["data", "train"])
@pytest.mark.parametrize(
    "change",
    [write("manifest.json"), write("prompt.json"), with_checkpoint],
    ids=["manifest.json", "prompt.json", "a checkpoint"],
)
def test_a_model_that_is_made_again_with_the_same_content_is_the_same(
    consolidated: Path, stage: str, change: Callable[[Path], object]
) -> None:
    before = model_of(stage, consolidated)
    change(consolidated)
    assert model_of(stage, consolidated) == before


@pytest.mark.parametrize(
    "stage, name",
    [
        ("data", "tokenizer.json"),
        ("precompile", "config.json"),
        ("train", "config.json"),
        ("train", "generation_config.json"),
        ("train", "model.safetensors"),
    ],
)
def test_what_a_stage_reads_of_a_model_counts(consolidated: Path, stage: str, name: str) -> None:
    before = model_of(stage, consolidated)
    write(name)(consolidated)
    assert model_of(stage, consolidated) != before
