"""Places that may not be written or read: a read-only disk, folders and files without permission, a
file where a folder must be."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Project, clean_environment
from tests.torture.small_disk import small_disk

pytestmark = pytest.mark.torture("disk")


def ordinary(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    """make, as one whom the permissions of files bind: root without the capabilities that set root
    apart, else this user."""
    command = ["make", "RECIPE=tiny", *arguments]
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root is bound by no permission, and setpriv (util-linux) is not here")
        without = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={without}", f"--inh-caps={without}", *command]
    return subprocess.run(
        command, cwd=project.folder, env=clean_environment(), capture_output=True, text=True
    )


def assert_refused(done: subprocess.CompletedProcess[str], *told: str) -> None:
    assert done.returncode
    assert "Traceback" not in done.stderr, done.stderr
    for words in told:
        assert words in done.stderr, done.stderr


def test_a_disk_that_is_mounted_read_only_is_named_and_nothing_else_suffers(built: Project) -> None:
    with small_disk(built) as disk:
        disk.restore(built.folder / "outputs")
        writable = [
            disk.make(*goal) for goal in (("status",), ("-n", "all"), ("-n", "data", "SEED=3"))
        ]
        assert disk.run("mount", "-o", "remount,ro", "outputs").returncode == 0
        asked = [
            disk.make(*goal) for goal in (("status",), ("-n", "all"), ("-n", "data", "SEED=3"))
        ]
        assert [done.stdout for done in asked] == [done.stdout for done in writable]
        assert [done.returncode for done in asked] == [0, 0, 0]
        assert disk.make("all").returncode == 0  # nothing is stale
        assert_refused(
            disk.make("data", "SEED=3"),
            "outputs/tiny is on a disk that is mounted read-only. Mount it for writing, or",
        )
        assert disk.run("mount", "-o", "remount,rw", "outputs").returncode == 0
        assert disk.make("data", "SEED=3").returncode == 0


@pytest.mark.parametrize("folder", ["outputs/tiny", "outputs"])
def test_a_folder_that_may_not_be_written_is_named(built: Project, folder: str) -> None:
    run, before = ("other" if folder == "outputs" else "tiny"), built.snapshot()
    (built.folder / folder).chmod(0o555)
    done = ordinary(built, "data", "SEED=3", f"RUN={run}")
    asked = ordinary(built, "status", f"RUN={run}")
    (built.folder / folder).chmod(0o755)
    assert_refused(
        done, f"{folder} cannot be written by user {os.getuid()}. Change its owner or its mode, or"
    )
    assert (asked.returncode, asked.stderr) == (0, "")
    assert built.snapshot() == before


def test_a_folder_of_another_that_no_one_may_enter_is_named(built: Project) -> None:
    (built.folder / "outputs/tiny/data").chmod(0o000)
    done = ordinary(built, "eval")
    (built.folder / "outputs/tiny/data").chmod(0o755)
    assert_refused(done, "'outputs/tiny/data' is not readable")


@pytest.mark.parametrize("place", ["outputs", "outputs/tiny"])
def test_a_file_where_a_folder_is_to_be_is_named(
    project: Project, tmp_path: Path, place: str
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(project.folder, folder, symlinks=True)
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_text("not a folder")
    done = ordinary(Project(folder), "data")
    assert_refused(done, f"{place} is a file. Remove it, or")
    assert (folder / place).read_text() == "not a folder"


def test_an_input_that_may_not_be_read_is_named(built: Project) -> None:
    rows = built.folder / "data/tiny/rows.jsonl"
    rows.write_text(rows.read_text() * 2)
    rows.chmod(0o000)
    done = ordinary(built, "data")
    rows.chmod(0o644)
    assert_refused(done, "data/tiny/rows.jsonl")


def test_an_output_of_an_earlier_stage_that_may_not_be_read_is_named(built: Project) -> None:
    shards = next((built.folder / "outputs/tiny/train/shards").glob("*.safetensors"))
    shards.chmod(0o000)
    done = ordinary(built, "consolidate", "MAX_SHARD_SIZE=100KB")
    shards.chmod(0o644)
    assert_refused(done, shards.name, "Permission denied")
    assert (built.folder / "outputs/tiny/consolidate/model.safetensors").is_file()
