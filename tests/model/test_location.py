"""Where MODEL_ID is, and where it must not be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stages.model.location import own_output_problems
from stages.run.errors import InputError
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "outputs/a/consolidate").mkdir(parents=True)
    (tmp_path / "outputs/a2/consolidate").mkdir(parents=True)
    (tmp_path / "link").symlink_to("outputs/a/consolidate")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


@pytest.mark.parametrize(
    "model", ["outputs/a/consolidate", "outputs/a", "link", "outputs/../outputs/a/consolidate"]
)
def test_a_run_is_not_trained_from_its_own_output(outputs: Path, model: str) -> None:
    [problem] = own_output_problems(model, Path("outputs/a"))
    assert "Set another RUN" in problem
    with pytest.raises(InputError, match="Set another RUN"):
        publish("train", replace(Settings(), model_id=model), {}, outputs / "a/train", nothing)
    assert not (outputs / "a/train").exists()


@pytest.mark.parametrize(
    "model", ["outputs/a2/consolidate", "outputs", "owner/name", "\0", "nowhere"]
)
def test_another_runs_output_is_a_base_like_any_other(outputs: Path, model: str) -> None:
    assert own_output_problems(model, Path("outputs/a")) == []


def nothing(work: Path) -> StageResult:
    raise AssertionError("the stage ran")
