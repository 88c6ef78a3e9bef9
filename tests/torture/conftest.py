"""A model to damage, and a training in which no process may start."""

from __future__ import annotations

from pathlib import Path

import pytest


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
