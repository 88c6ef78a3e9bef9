"""A disk that is full when a stage starts, or that another process fills while it works."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Project
from tests.torture.plugin import Torture
from tests.torture.small_disk import SmallDisk, small_disk

pytestmark = pytest.mark.torture("disk")

KB = 1000
# Stage -> settings that make it alone stale, about what it writes at most, and how many amounts of
# room the long form tries.
STAGES = {
    "data": ("SEED=3", 220 * KB, 12),
    "precompile": ("GRADIENT_ACCUMULATION_STEPS=2", 600 * KB, 4),
    "train": ("LEARNING_RATE=1e-2 MAX_STEPS=4 SAVE_STEPS=1", 3_500 * KB, 5),
    "consolidate": ("MAX_SHARD_SIZE=100KB", 480 * KB, 6),
    "compile-inference": ("INFERENCE_SEQUENCE_LENGTH=32", 8_000 * KB, 2),
    "eval": ("TOP_K=3", 12 * KB, 4),
}
# Less than a stage can tell that it needs; and enough for its checks, but not for all that it
# writes.
TOO_LITTLE = {
    "data": 16 * KB,
    "precompile": 100 * KB,
    "train": 1_000 * KB,
    "consolidate": 250 * KB,
    "compile-inference": 250 * KB,
}
RUNS_OUT = {"data": 150 * KB, "consolidate": 320 * KB, "eval": 0}


@pytest.fixture(scope="module")
def disk(built_once: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    """A copy of the built project, on a path without a space, so that compilers work in outputs/
    too; its outputs are a small disk."""
    folder = tmp_path_factory.mktemp("disk") / "project"
    shutil.copytree(
        built_once.folder, folder, symlinks=True, ignore=shutil.ignore_patterns("outputs")
    )
    with small_disk(Project(folder)) as disk:
        yield disk


@pytest.fixture
def outputs(built_once: Project, disk: SmallDisk) -> Path:
    """The built project's outputs, a copy of which is on the disk."""
    outputs = built_once.folder / "outputs"
    disk.restore(outputs)
    return outputs


def digests(outputs: Path) -> dict[str, dict[str, str]]:
    """Stage -> sha256 of each file that its manifest lists, as it is; raises where one is
    missing."""
    manifests = {
        path.parent: json.loads(path.read_bytes())
        for path in sorted(outputs.glob("tiny/*/manifest.json"))
    }
    return {
        folder.name: {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in manifest["outputs"]
        }
        for folder, manifest in manifests.items()
    }


def assert_whole(outputs: Path) -> None:
    """Every published output is what its manifest says."""
    for stage, found in digests(outputs).items():
        manifest = json.loads((outputs / "tiny" / stage / "manifest.json").read_bytes())
        assert found == {name: facts["sha256"] for name, facts in manifest["outputs"].items()}
    assert not list(outputs.rglob("*.writing"))


def assert_told(stderr: str) -> None:
    """The message names a file or folder on the disk, sizes and a remedy, without a traceback."""
    assert "Traceback" not in stderr, stderr
    # A rank's message, then its stage's.
    message = next(line for line in stderr.splitlines() if line.startswith("failed: "))
    assert re.match(
        r"failed: .*outputs/(tiny|\.cache)/.*\b\d[\d.]* (B|kB|MB)\b.*\. Make room, or", message
    ), message


def run_out(disk: SmallDisk, stage: str, before: dict) -> bool:
    """Make `stage` again on the disk as it is; whether it failed. It may only as it should, with
    all that was published whole."""
    done = disk.make(stage, *STAGES[stage][0].split())
    if done.returncode:
        assert_told(done.stderr)
        assert digests(disk.outputs) == before
    assert_whole(disk.outputs)
    return done.returncode != 0


@pytest.mark.parametrize("stage", TOO_LITTLE)
def test_a_stage_that_will_not_fit_says_so_before_it_writes(
    stage: str, disk: SmallDisk, outputs: Path
) -> None:
    disk.leave(TOO_LITTLE[stage])
    done = disk.make(stage, *STAGES[stage][0].split())
    assert done.returncode
    assert re.search(r"has room for .* are needed for .*\. Make room, or", done.stderr), done.stderr
    assert_told(done.stderr)
    assert digests(disk.outputs) == digests(outputs)


def test_random_weights_that_will_not_fit_are_not_half_made(disk: SmallDisk, outputs: Path) -> None:
    shutil.rmtree(disk.outputs / ".cache")
    disk.leave(100 * KB)
    done = disk.make("train", *STAGES["train"][0].split())
    assert done.returncode
    assert_told(done.stderr)
    assert "needed for the random base model" in done.stderr
    assert_whole(disk.outputs)


@pytest.mark.parametrize("stage", RUNS_OUT)
def test_a_disk_that_runs_out_leaves_the_former_outputs_and_a_message(
    stage: str, disk: SmallDisk, outputs: Path
) -> None:
    disk.leave(RUNS_OUT[stage])
    assert run_out(disk, stage, digests(outputs))


def test_a_training_goes_on_from_its_checkpoint_once_there_is_room(
    disk: SmallDisk, outputs: Path, torture: Torture
) -> None:
    """The disk is filled by another after the first checkpoint: no later one fits."""
    torture.require_long()
    settings = STAGES["train"][0].split()
    with filled_when(disk, "tiny/.work/train-*/checkpoints/step-00000001", room=0):
        done = disk.make("train", *settings)
    assert done.returncode
    assert_told(done.stderr)
    assert_whole(disk.outputs)
    disk.free()
    assert re.search(r"train: [234]/4", disk.make("train", *settings).stderr)
    assert_whole(disk.outputs)


@pytest.mark.parametrize("stage", STAGES)
def test_any_amount_of_room_is_enough_or_told(
    stage: str, disk: SmallDisk, outputs: Path, torture: Torture
) -> None:
    """Random amounts of room, then, without cleaning by hand, enough of it."""
    torture.require_long()
    before, (_, most, number) = digests(outputs), STAGES[stage]
    for _ in range(number):
        disk.restore(outputs)
        disk.leave(int(torture.random.uniform(0, most)))
        run_out(disk, stage, before)
    disk.free()
    assert not run_out(disk, stage, before)
    torture.count(number)


class filled_when:
    """Within it, the disk is filled to `room` bytes as soon as a path that matches `pattern` is
    there."""

    def __init__(self, disk: SmallDisk, pattern: str, room: int):
        self._disk, self._pattern, self._room = disk, pattern, room
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            if any(self._disk.outputs.glob(self._pattern)):
                self._disk.leave(self._room)
                return

    def __enter__(self) -> None:
        self._watcher.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._watcher.join()
