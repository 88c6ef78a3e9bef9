"""Tokens and keys in the environment come to are in no file, no output and no command line."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stages.run.setting import STAGES
from tests.backends.neuron.test_make import RUN as NEURON_RUN
from tests.backends.neuron.test_make import machine
from tests.conftest import Project, clean_environment, copy_project
from tests.torture.canaries import CANARIES, CommandLines, held, holding, watched
from tests.torture.plugin import Torture

pytestmark = pytest.mark.torture("secrets")

ENGINE = """\
#!{python}
import json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ)]), file=open({record!r}, "a"))
"""


@pytest.fixture(scope="module")
def everything(built_once: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The run that all tests share, and whatever else one asks of make, with secrets in the
    environment."""
    beside = (
        tmp_path_factory.mktemp("secrets") / "built"
    )  # with what the shared run left in its HOME and TMPDIR
    shutil.copytree(built_once.folder.parent, beside, symlinks=True)
    project = Project(beside / built_once.folder.name)
    engine = project.folder.parent / "engine"
    engine.write_text(
        ENGINE.format(python=sys.executable, record=str(project.folder.parent / "engine.jsonl"))
    )
    engine.chmod(0o755)
    (project.folder.parent / "bad.jsonl").write_text('{"instruction": 3}\n')
    environment = clean_environment() | {"RECIPE": "tiny", "DOCKER": str(engine)}
    environment["NEURON_COMPILE_CACHE_URL"] = "/tmp/trn-tune-test-cache"
    asked = (
        ("make", "help"),
        ("make", "status"),
        ("make", "-n", "all", "LEARNING_RATE=2e-3"),
        ("make", "doctor"),
        ("make", "data", "RUN=fails", f"DATASET={project.folder.parent / 'bad.jsonl'}"),
        ("make", "data", "RUN=refused", "LEARNING_RATE=x"),
        ("make", "image"),
        ("make", "shell"),
        ("docker/run", "train", "BACKEND=torch"),
    )
    for words in asked:
        watched(list(words), project.folder, environment)
    watched(
        ["make", "eval"],
        project.folder,
        environment | {"PROMPT": f"What is {CANARIES['HF_TOKEN']}?"},
    )  # a private prompt
    return project


def seen(project: Project) -> list[dict]:
    return [
        json.loads(line) for line in (project.folder.parent / "seen.jsonl").read_text().splitlines()
    ]


def engines_calls(project: Project) -> list[tuple[list[str], dict[str, str]]]:
    return [
        json.loads(line)
        for line in (project.folder.parent / "engine.jsonl").read_text().splitlines()
    ]


def test_no_output_cache_or_temporary_file_holds_a_secret(
    everything: Project, torture: Torture
) -> None:
    for folder in (
        everything.folder,
        everything.folder.parent / "home",
        everything.folder.parent / "tmp",
    ):
        found, read = holding(folder)
        assert not found
        torture.count(read)
    assert {stage for stage in STAGES if everything.manifest(stage)} == set(STAGES)


def test_nothing_printed_holds_a_secret(everything: Project) -> None:
    for one in seen(everything):
        assert one["printed"], one["words"]
        assert not held(one["printed"].encode()), one["words"]


def test_no_command_line_holds_a_secret_while_anything_runs(everything: Project) -> None:
    runs = seen(everything)
    assert sum(one["looks"] for one in runs) > 10 * len(runs)
    assert [one["words"] for one in runs if one["command_lines"]] == []


# Another name of HF_TOKEN.
KEPT_OUT = ("HUGGING_FACE_HUB_TOKEN",)


def test_a_container_gets_secrets_by_name_only(everything: Project) -> None:
    for arguments, environment in engines_calls(everything):
        assert not held(json.dumps(arguments).encode())
        assert {name: environment[name] for name in CANARIES if name in arguments} == (
            {name: value for name, value in CANARIES.items() if name not in KEPT_OUT}
            if arguments[0] == "run"
            else {}
        )


@pytest.mark.parametrize("goal", ["all", "data", "eval", "status"])
def test_a_secret_typed_as_an_argument_is_refused_and_not_repeated(
    project: Project, goal: str
) -> None:
    done = project.make(goal, f"HF_TOKEN={CANARIES['HF_TOKEN']}", check=False)
    assert done.returncode == 2
    assert (
        "HF_TOKEN is not a setting. Everyone on this machine can see an argument: export it"
        in done.stderr
    )
    assert not held((done.stdout + done.stderr).encode())


def test_an_index_with_a_password_builds_no_image(project: Project) -> None:
    done = project.make(
        "image",
        "DOCKER=/bin/false",
        check=False,
        PIP_EXTRA_INDEX_URL="https://me:canary@pypi.example.com/simple",
    )
    assert (
        done.returncode == 2
        and "PIP_EXTRA_INDEX_URL" in done.stderr
        and "canary" not in done.stdout + done.stderr
    )


# The search itself.


@pytest.mark.parametrize("way", ["plain", "name", "base64", "hexadecimal", "gzip", "zip"])
def test_a_planted_secret_is_found(tmp_path: Path, way: str) -> None:
    content = f"key: {CANARIES['WANDB_API_KEY']} and more".encode()
    changed = {
        "base64": base64.b64encode(content),
        "hexadecimal": content.hex().encode(),
        "gzip": gzip.compress(content),
    }
    path = tmp_path / (CANARIES["WANDB_API_KEY"] if way == "name" else "planted")
    path.write_bytes(changed.get(way, content if way == "plain" else b""))
    if way == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("inside", content)
    assert holding(tmp_path)[0] == {path.name: ["WANDB_API_KEY"]}


def test_a_secret_in_a_command_line_is_seen() -> None:
    with CommandLines() as lines:
        subprocess.run(
            [sys.executable, "-c", "import time; time.sleep(0.5)", CANARIES["HF_TOKEN"]], check=True
        )
    assert any(CANARIES["HF_TOKEN"] in line for line in lines.found)


# At length.


def test_no_stage_on_neuron_leaves_a_secret(tmp_path: Path, torture: Torture) -> None:
    torture.require_long()
    pytest.importorskip("optimum.neuron", reason="optimum-neuron has no release for this Python")
    project = copy_project(tmp_path / "project")
    done = watched(
        ["make", "all", *NEURON_RUN], project.folder, clean_environment() | machine(project)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (one,) = seen(project)
    assert not one["command_lines"] and not held(one["printed"].encode())
    (
        project.folder / "called.jsonl"
    ).unlink()  # the fakes' own record of the environment they were given
    found, read = holding(tmp_path)
    assert not found
    torture.count(read)
