"""Clocks that are wrong and outputs that came from elsewhere: nothing reruns for them, and nothing
is taken for fresh that is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.run.setting import STAGES
from tests.conftest import Project
from tests.torture.plugin import Torture

pytestmark = pytest.mark.torture("clocks and copies")
TINY = ("RECIPE=tiny",)
AFTER_DATA = ["train", "consolidate", "compile-inference", "eval"]


def require_fresh(project: Project) -> None:
    assert project.stages_to_run("all", *TINY) == []
    assert project.make("-q", "all", *TINY).returncode == 0


@pytest.mark.parametrize("copy", ["cp -r", "cp -a", "rsync -a", "rsync -r --checksum"])
def test_outputs_copied_to_another_clone_are_fresh(
    copy: str, built_once: Project, tmp_path: Path
) -> None:
    if shutil.which(copy.split()[0]) is None:
        pytest.skip(f"{copy.split()[0]} is not installed")
    there = Project(tmp_path / "clone")
    shutil.copytree(
        built_once.folder, there.folder, symlinks=True, ignore=shutil.ignore_patterns("outputs")
    )
    subprocess.run([*copy.split(), f"{built_once.folder}/outputs", f"{there.folder}/"], check=True)
    require_fresh(there)
    done = there.make("all", *TINY)
    assert "published" not in done.stdout


YEAR = 365 * 24 * 3600
CLOCKS: dict[str, Callable[[Torture], float]] = {
    "1970": lambda torture: 1.0,
    "2099": lambda torture: 129.5 * YEAR,
    "any year": lambda torture: torture.random.uniform(0, 130 * YEAR),
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_files_of_any_time_are_fresh(clock: str, built: Project, torture: Torture) -> None:
    for path in built.folder.rglob("*"):
        if not path.is_symlink() and ".venv" not in path.parts:
            when = CLOCKS[clock](torture)
            os.utime(path, (when, when))
    require_fresh(built)
    before = {stage: built.manifest(stage) for stage in STAGES}
    built.make("all", *TINY)
    assert {stage: built.manifest(stage) for stage in STAGES} == before


def edit_unseen(path: Path, old: str, new: str) -> None:
    """Another content of the same size, in the same file, with the time of before."""
    text, stat = path.read_text(encoding="utf-8"), path.stat()
    assert old in text and len(old.encode()) == len(new.encode())
    with path.open("r+", encoding="utf-8", newline="") as file:
        file.write(text.replace(old, new))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ino,
    )


@pytest.mark.parametrize(
    ("file", "old", "new", "stages"),
    [
        ("data/tiny/rows.jsonl", "Trainium", "Tranquil", ["data", *AFTER_DATA]),
        ("data/tiny/prompts.jsonl", "What", "Whom", ["eval"]),
        (
            "data/tiny/config.json",
            '"rms_norm_eps": 1e-06',
            '"rms_norm_eps": 1e-05',
            ["precompile", *AFTER_DATA],
        ),
        ("stages/backends/torch/optimizer.py", "return", "yield ", AFTER_DATA),
    ],
)
def test_an_edit_that_keeps_size_and_time_is_seen(
    file: str, old: str, new: str, stages: list[str], built: Project
) -> None:
    edit_unseen(built.folder / file, old, new)
    assert [
        stage
        for stage in built.stages_to_run("all", *TINY)
        if stage != "precompile" or stage in stages
    ] == stages


@pytest.mark.parametrize("copied", ["all of it", "its files but not the manifest"])
def test_outputs_of_another_run_copied_over_this_ones_are_not_taken_for_its_own(
    copied: str, built: Project
) -> None:
    built.make("data", *TINY, "RUN=other", "VALIDATION_FRACTION=0.5")
    other, own = built.folder / "outputs/other/data", built.folder / "outputs/tiny/data"
    manifest = (own / "manifest.json").read_bytes()
    shutil.copytree(other, own, dirs_exist_ok=True)
    if copied != "all of it":
        (own / "manifest.json").write_bytes(manifest)
    assert built.stages_to_run("all", *TINY) == ["data", *AFTER_DATA]
    done = built.make("all", *TINY)
    assert "data: published" in done.stdout
    assert all(f"{stage}: up to date" in done.stdout for stage in AFTER_DATA), (
        "data came out as before"
    )


# Runs in each stage before the stage itself: the clock that it asks goes back an hour at each look.
CLOCK_SET_BACK = """
import time
looks, true_time, true_gmtime = [0], time.time, time.gmtime
def back():
    looks[0] += 1
    return true_time() - 3600 * looks[0]
time.time = back
time.gmtime = lambda seconds=None: true_gmtime(back() if seconds is None else seconds)
"""


def test_a_clock_that_is_set_back_while_a_stage_runs_changes_nothing(
    built: Project, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(CLOCK_SET_BACK)
    started = time.monotonic()
    built.make("precompile", *TINY, "RUN=back", PYTHONPATH=str(tmp_path))
    taken = time.monotonic() - started
    for stage in ("data", "precompile"):
        assert 0 <= built.manifest(stage, "back")["seconds"] <= taken
    assert 0 < built.manifest("precompile", "back")["metrics"]["seconds_per_step"] <= taken
    assert built.manifest("data", "back")["content"] == built.manifest("data")["content"]
    assert built.manifest("data", "back")["finished"] < built.manifest("data")["finished"], (
        "the clock was not set back"
    )
    assert built.stages_to_run("precompile", *TINY, "RUN=back") == []
