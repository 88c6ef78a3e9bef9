"""What a tracker lacks is said before anything runs, with what to do."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from stages.checks import machine_problems
from stages.run.settings import Settings
from stages.track import check
from stages.track.check import tracker_problems
from tests.conftest import Project


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def problems(tracker: str) -> list[str]:
    return list(tracker_problems(Settings(tracker=tracker, backend="torch")))


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        check.importlib.util, "find_spec", lambda name: None if name in modules else real(name)
    )


@pytest.mark.parametrize("tracker", ["none", "tensorboard", "mlflow"])
def test_what_is_installed_is_no_problem(tracker: str) -> None:
    assert problems(tracker) == []


@pytest.mark.parametrize(
    ("tracker", "packages"),
    [
        ("tensorboard", "tensorboard"),
        ("mlflow", "mlflow-skinny sqlalchemy alembic"),
        ("trackio", "trackio"),
    ],
)
def test_a_missing_library_is_named_with_the_command(
    tracker: str, packages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "tensorboard", "mlflow", "trackio")
    (problem,) = problems(tracker)
    assert f"TRACKER={tracker} needs what is not installed: {tracker}." in problem
    assert f"bin/python -m pip install -r requirements.txt {packages}`" in problem


def test_mlflows_server_needs_no_database_here(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "sqlalchemy", "alembic")
    assert "sqlalchemy, alembic" in problems("mlflow")[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
    assert problems("mlflow") == []


@pytest.mark.parametrize(
    "variables",
    [
        {"WANDB_API_KEY": "k"},
        {"WANDB_MODE": "offline"},
        {"WANDB_IDENTITY_TOKEN_FILE": "/token"},
        {"NETRC": "keys"},
        {"NETRC": "keys", "WANDB_BASE_URL": "https://other.example.com"},
    ],
)
def test_wandb_that_would_ask_for_a_key_is_refused(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def asks() -> bool:
        return any("W&B has no key here" in problem for problem in problems("wandb"))

    monkeypatch.chdir(tmp_path)
    Path("keys").write_text("machine api.wandb.ai login user password k\n")
    assert asks()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert asks() == ("WANDB_BASE_URL" in variables)  # a key of another server


def test_only_stages_that_come_before_the_training_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "tensorboard")
    settings = Settings(tracker="tensorboard", backend="torch")
    assert not machine_problems(settings, {"data"}) and not machine_problems(settings, {"eval"})
    for stage in ("precompile", "train"):
        assert "TRACKER=tensorboard needs" in machine_problems(settings, {stage})[0]


def test_make_refuses_a_missing_library_before_data(project: Project) -> None:
    if importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed here")
    done = project.make("all", "RECIPE=tiny", "TRACKER=trackio", check=False)
    assert done.returncode == 2
    command = ".venv/bin/python -m pip install -r requirements.txt trackio"
    assert f"Run `{command}`" in done.stderr
    assert project.make("-n", "data", "RECIPE=tiny", "TRACKER=trackio").returncode == 0
