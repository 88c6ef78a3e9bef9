"""make verify: what it reads, what it says, and how it ends; and what it means that bytes are on
the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.make.verify import damage_of
from stages.run import fsync
from stages.run.fingerprint import ROOT
from stages.run.layout import MANIFEST_FILE
from stages.run.manifest import manifest_of, with_checksum
from stages.run.provenance import reasons
from stages.run.publish import StageResult, publish, write_json
from stages.run.settings import Settings


def verify(run_folder: Path, *stages: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-I",
        "-S",
        "stages/make/verify.py",
        str(run_folder),
        *(stages or ("data", "train")),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A published output of two files."""

    def build(work: Path) -> StageResult:
        (work / "part").mkdir()
        (work / "part" / "weights").write_bytes(b"weights")
        (work / "config.json").write_text("{}")
        return StageResult()

    publish("data", Settings(), {}, tmp_path / "data", build)
    return tmp_path / "data"


def test_what_is_whole_is_said_with_its_files_and_bytes(output: Path) -> None:
    done = verify(output.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "              data  2 files, 9 B, as published\n"


def test_what_is_damaged_is_named_with_the_remedy(output: Path) -> None:
    (output / "part" / "weights").write_bytes(b"weighty")
    (output / "more").write_bytes(b"")
    done = verify(output.parent)
    assert done.returncode == 1
    assert (
        done.stdout
        == "              data  DAMAGED: part/weights has other bytes than were published; more "
        "was not published\n"
    )
    assert done.stderr == "1 of 1 stages damaged. `make all VERIFY=1` makes them again.\n"


def test_a_run_without_outputs_is_not_called_whole(tmp_path: Path) -> None:
    done = verify(tmp_path / "misspelt")
    assert done.returncode == 1 and "holds nothing" in done.stderr


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"provenance": {}, "outputs": {}}']
)
def test_a_manifest_that_cannot_be_believed_is_damage(output: Path, content: bytes) -> None:
    (output / MANIFEST_FILE).write_bytes(content)
    assert damage_of(output) == ["manifest.json is damaged"]
    assert reasons("data", Settings(), {}, output) == ["manifest.json is damaged"]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "part/../../outside", ""])
def test_a_manifest_that_names_a_file_outside_is_refused(output: Path, name: str) -> None:
    manifest = manifest_of(output) or {}
    manifest["outputs"][name] = {"bytes": 1, "sha256": "0" * 64}
    write_json(output / MANIFEST_FILE, with_checksum(manifest))
    assert damage_of(output) == [f"manifest.json names {name!r}, which is outside"]


def test_a_link_out_of_the_output_is_not_followed(output: Path, tmp_path: Path) -> None:
    (output / "config.json").rename(tmp_path / "elsewhere")
    (output / "config.json").symlink_to(tmp_path / "elsewhere")
    assert "config.json is no plain file" in damage_of(output)


def test_a_stage_that_is_published_again_meanwhile_is_looked_at_again(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.make import verify as verifying

    looked = []

    def damage_as_it_changes(manifest: dict, folder: Path, read: bool) -> list[str]:
        looked.append(manifest["provenance"]["settings"]["MAX_LENGTH"])
        if len(looked) == 1:
            publish("data", Settings(max_length=64), {}, folder, lambda work: StageResult())
            return ["config.json is missing"]
        return []

    monkeypatch.setattr(verifying, "file_problems", damage_as_it_changes)
    assert damage_of(output) == [] and looked == [2048, 64]


def test_with_VERIFY_a_file_of_the_same_size_with_other_bytes_is_a_reason_to_run(
    output: Path,
) -> None:
    (output / "part" / "weights").write_bytes(b"weighty")
    assert reasons("data", Settings(), {}, output) == []
    assert reasons("data", Settings(verify=True), {}, output) == [
        "part/weights has other bytes than were published"
    ]


def test_progress_needs_no_installed_package(output: Path) -> None:
    """make's own Python may have none; on a terminal a bar would be drawn where tqdm is there."""
    show = (
        "import sys; sys.path.insert(0, '.'); sys.stderr.isatty = lambda: True; from "
        "stages.run.progress import Progress\n"
    )
    show += "with Progress('reading', 2, 'bytes') as bar: bar.update(1, line=True)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", show], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr.startswith("reading: 1/2 bytes")


def test_every_file_and_folder_of_a_tree_is_flushed_before_the_folder_that_names_it(
    tmp_path: Path, monkeypatch
) -> None:
    for name in ("a", "one/b", "one/two/c"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text("x")
    (tmp_path / "tree" / "gone").symlink_to("nowhere")
    flushed: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    fsync.fsync_tree(tmp_path / "tree")
    names = [Path(path).relative_to(tmp_path).as_posix() for path in flushed]
    assert sorted(names) == [
        "tree",
        "tree/a",
        "tree/one",
        "tree/one/b",
        "tree/one/two",
        "tree/one/two/c",
    ]
    assert all(
        names.index(name) < names.index(str(Path(name).parent)) for name in names if name != "tree"
    )


def test_a_folder_is_made_with_each_name_above_it_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    fsync.make_durable_folder(tmp_path / "outputs" / "run")
    assert flushed == [str(tmp_path), str(tmp_path / "outputs")]
    fsync.make_durable_folder(tmp_path / "outputs" / "run")
    assert len(flushed) == 2, "what is there needs no flush"
