"""What the tests share: a copy of the project to run its real Makefile in, and a dataset small
enough to train on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.torture.canaries import watched

if TYPE_CHECKING:
    from tests.fakes.neuron_machine import FakeMachine

pytest_plugins = ["tests.torture.plugin"]

ROOT = Path(__file__).resolve().parents[1]

# The six stages in half a minute: one layer, two steps, on the demo's tokenizer.
TINY_RECIPE = """\
MODEL_ID ?= data/tiny
INIT_WEIGHTS ?= random
DATASET ?= data/tiny/rows.jsonl
PROMPTS ?= data/tiny/prompts.jsonl
MAX_LENGTH ?= 64
MAX_STEPS ?= 2
LEARNING_RATE ?= 1e-3
VALIDATION_FRACTION ?= 0.2
BF16 ?= 0
LOGGING_STEPS ?= 1
INFERENCE_SEQUENCE_LENGTH ?= 64
MAX_NEW_TOKENS ?= 4
"""


# What `make check` leaves to `make test`: whatever trains, compiles, starts make or a server.
SLOW_FOLDERS = ("torture", "backends", "docker")
SLOW_FILES = (
    *("test_makefile.py", "test_demo.py", "test_doctor.py", "test_audit.py"),
    *("test_settings_given.py", "test_mutations.py", "test_manifest.py", "test_launch.py"),
    *("test_publish.py", "test_guard.py", "test_verify.py"),
    *("test_hub.py", "test_hub_cache.py", "test_base.py", "test_from_pickles.py"),
    *("test_remote_sources.py", "test_sources.py", "test_fuzz.py", "test_dataset.py"),
    *("test_chat_format.py", "test_render.py", "test_push.py", "test_serve_check.py"),
    *("test_rehearse.py", "test_report.py", "test_plan.py", "test_trace.py"),
    *("test_follow.py", "test_tracked_stage.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests, and run the fast ones first; in the long form kills, the longest, do."""
    last = ("torture", "backends", "test_makefile.py", "test_demo.py")
    for item in items:
        if item.path.name in SLOW_FILES or set(SLOW_FOLDERS) & set(item.path.parts):
            item.add_marker(pytest.mark.slow)
    items.sort(
        key=lambda item: next((n for n, name in enumerate(last) if name in item.path.parts), -1)
    )
    if items and items[0].config.getoption("--torture") is not None:
        items.sort(key=lambda item: "kills" not in item.path.name)


@dataclass(frozen=True)
class Project:
    """A copy of the project in a folder of its own; `make` runs its Makefile without the settings
    of this process."""

    folder: Path

    def make(
        self, *arguments: str, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command = ["make", *arguments]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**clean_environment(), **environment},
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done

    def stages_to_run(self, *arguments: str, **environment: str) -> list[str]:
        """The stages that `make -n` says it would run."""
        lines = self.make("-n", *(arguments or ("all",)), **environment).stdout.splitlines()
        return [
            line.split("stages.")[1].split()[0].replace("_", "-")
            for line in lines
            if " -m stages." in line
        ]

    def manifest(self, stage: str, run: str = "tiny") -> dict:
        return json.loads((self.folder / "outputs" / run / stage / "manifest.json").read_text())

    def snapshot(self) -> dict[str, tuple[int, int]]:
        """Every file of the project and its outputs with size and time: what must not change when
        one only asks."""
        files = (
            path
            for path in self.folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        )
        return {
            str(path): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in files
            if ".venv" not in path.parts
        }


def clean_environment() -> dict[str, str]:
    """This process's environment without make's variables and the project's settings; Hugging Face
    stays off-line."""
    from stages.run.settings import Settings

    names = {name.upper() for name in Settings.__dataclass_fields__} | {
        "MAKEFLAGS",
        "MAKELEVEL",
        "MFLAGS",
        "RECIPE",
        "RUN",
    }
    return {name: value for name, value in os.environ.items() if name not in names} | {
        "HF_HUB_OFFLINE": "1"
    }


def torchrun(processes: int, module: str) -> list[str]:
    """The command that runs a module of the tests in several processes, as the torch backend starts
    its own; from ROOT."""
    return [
        sys.executable,
        "-m",
        "stages.backends.torch.torchrun",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "-m",
        module,
    ]


def copy_project(folder: Path) -> Project:
    """The project's files (not its outputs) in `folder`, sharing the installed environment."""
    ignored = shutil.ignore_patterns(
        "outputs", ".venv", ".git", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    if (ROOT / ".venv").exists():
        (folder / ".venv").symlink_to(ROOT / ".venv")
    tiny = folder / "data" / "tiny"
    shutil.copytree(folder / "data" / "demo" / "model", tiny)
    config = json.loads((tiny / "config.json").read_text())
    config.update(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    (tiny / "config.json").write_text(json.dumps(config))
    rows = (folder / "data" / "demo" / "demo.jsonl").read_text().splitlines(keepends=True)[:20]
    (tiny / "rows.jsonl").write_text("".join(rows))
    (tiny / "prompts.jsonl").write_text("".join(rows[:2]))
    (folder / "recipes" / "tiny.mk").write_text(TINY_RECIPE)
    return Project(folder)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project on which no stage has run; tests must leave it so."""
    return copy_project(tmp_path_factory.mktemp("fresh") / "project")


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose six stages ran on the tiny recipe, in a folder with a space in its name, with
    secrets in the environment."""
    base = tmp_path_factory.getbasetemp()
    shared = (
        base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    )  # the processes of one test run build it once
    with open(shared / "built.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = Project(shared / "built" / "my project")
        if not built.folder.exists():
            copy_project(built.folder)
            done = watched(["make", "-j4", "all", "RECIPE=tiny"], built.folder, clean_environment())
            assert done.returncode == 0, done.stdout + done.stderr
    return built


@pytest.fixture
def built(built_once: Project, tmp_path: Path) -> Project:
    """A copy of the built project, to change at will: other times, other inodes, another path."""
    shutil.copytree(
        built_once.folder, tmp_path / "copy of it", symlinks=True, copy_function=shutil.copy
    )
    return Project(tmp_path / "copy of it")


@pytest.fixture
def fake_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """A Neuron machine made of files."""
    from tests.fakes.neuron_machine import FakeMachine

    return FakeMachine(tmp_path / "machine", monkeypatch)


@pytest.fixture
def no_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process of a training that starts is a failure. Models that are made go to a folder of the
    test's own."""

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
