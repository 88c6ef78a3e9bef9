"""Files that a disk, a hand or a copy has damaged: found, named, and made again from what is
whole."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stages.backends.torch.train import environment, train, training_command
from stages.make.verify import damage_of
from stages.model.base import base_model_folder
from stages.run.fingerprint import ROOT
from stages.run.layout import MANIFEST_FILE
from stages.run.manifest import file_problems, manifest_of
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings
from tests.conftest import Project
from tests.small_training import shards
from tests.torture.checkpoints import checkpoint_of, resumed
from tests.torture.plugin import Torture

pytestmark = pytest.mark.torture("damage")

STAGES = ("data", "precompile", "train", "consolidate", "compile-inference", "eval")


# A fault: damages one file below a folder and returns what a message about it is to hold.


def flip_a_bit(folder: Path, file: Path, chance: random.Random) -> str:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return f"{file.relative_to(folder)} has other bytes"


def truncate(folder: Path, file: Path, chance: random.Random) -> str:
    size = file.stat().st_size
    os.truncate(file, chance.randrange(size))
    return f"{file.relative_to(folder)} has {file.stat().st_size} bytes, not {size}"


def lengthen(folder: Path, file: Path, chance: random.Random) -> str:
    with file.open("ab") as opened:
        opened.write(chance.randbytes(chance.randrange(1, 5000)))
    return f"{file.relative_to(folder)} has {file.stat().st_size} bytes"


def remove(folder: Path, file: Path, chance: random.Random) -> str:
    file.unlink()
    return f"{file.relative_to(folder)} is missing"


def fill_with_zeros(folder: Path, file: Path, chance: random.Random) -> str:
    file.write_bytes(bytes(file.stat().st_size))
    return f"{file.relative_to(folder)} has other bytes"


def put_a_folder_in_its_place(folder: Path, file: Path, chance: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return f"{file.relative_to(folder)} is no plain file"


def link_outside(folder: Path, file: Path, chance: random.Random) -> str:
    outside = folder.parent.parent / f"outside-{chance.randrange(2**32)}"
    file.rename(outside)
    file.symlink_to(outside)
    return f"{file.relative_to(folder)} is no plain file"


def add(folder: Path, file: Path, chance: random.Random) -> str:
    added = file.with_name(f"added-{chance.randrange(1000)}")
    added.write_bytes(chance.randbytes(10))
    return f"{added.relative_to(folder)} was not published"


SEEN_BY_SIZE: list[Callable] = [truncate, lengthen, remove, put_a_folder_in_its_place, link_outside]
FAULTS: list[Callable] = [*SEEN_BY_SIZE, flip_a_bit, fill_with_zeros, add]


def a_file_of(folder: Path, chance: random.Random) -> Path:
    return chance.choice(
        sorted(
            path
            for path in folder.rglob("*")
            if path.is_file() and path.name != MANIFEST_FILE and any(path.read_bytes())
        )
    )


# Published outputs.


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A small published output in a run."""

    def build(work: Path) -> StageResult:
        for name in ("weights", "nested/deeper/shard", "nested/list", "a name with spaces"):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(random.Random(name).randbytes(3000))
        return StageResult()

    publish("data", Settings(), {}, tmp_path / "run" / "data", build)
    return tmp_path / "run" / "data"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(
    fault: Callable, published: Path, tmp_path: Path, torture: Torture
) -> None:
    assert damage_of(published) == []
    for _ in range(torture.times(3, 100)):
        copy = tmp_path / "copies" / "run" / "data"
        shutil.copytree(published, copy)
        expected = fault(copy, a_file_of(copy, torture.random), torture.random)
        found = damage_of(copy)
        assert len(found) == 1 and found[0].startswith(expected)
        seen_by_size = file_problems(manifest_of(copy) or {}, copy)
        assert seen_by_size == (found if fault in SEEN_BY_SIZE else [])
        torture.count()
        shutil.rmtree(copy)


def test_a_manifest_is_no_longer_believed_when_a_byte_of_it_is_changed(
    published: Path, torture: Torture
) -> None:
    text = (published / MANIFEST_FILE).read_bytes()
    for _ in range(torture.times(100, 3000)):
        place, value = torture.random.randrange(len(text)), torture.random.randrange(256)
        changed = text[:place] + bytes([value]) + text[place + 1 :]
        (published / MANIFEST_FILE).write_bytes(changed)
        try:
            same = json.loads(changed) == json.loads(text)
        except ValueError:
            same = False
        assert same or manifest_of(published) is None
        torture.count()


def test_nothing_outside_an_output_is_read_for_it(published: Path, tmp_path: Path) -> None:
    """Through a folder that is a link, the names in the manifest lead outside although they look as
    they should."""
    (published / "nested").rename(tmp_path / "elsewhere")
    (published / "nested").symlink_to(tmp_path / "elsewhere")
    found = damage_of(published)
    assert (
        "nested/deeper/shard is outside, through a link" in found
        and "nested was not published" in found
    )


def test_make_finds_damage_in_every_stage_and_makes_it_again(
    built: Project, torture: Torture
) -> None:
    """The long form damages all six stages, the short one those that are made again soon."""
    outputs = built.folder / "outputs/tiny"
    stages = STAGES if torture.long else ("data", "consolidate")
    same = [
        stage for stage in STAGES if stage != "compile-inference"
    ]  # inductor does not give the same bytes twice
    before = {stage: built.manifest(stage)["content"] for stage in same}
    faults = {}
    for stage in stages:
        fault = torture.random.choice(FAULTS)
        faults[stage] = fault(
            outputs / stage, a_file_of(outputs / stage, torture.random), torture.random
        )
        torture.count()
    said = built.make("verify", "RECIPE=tiny", check=False)
    assert said.returncode == 2 and "make all VERIFY=1" in said.stderr
    lines = {line.split()[0]: line for line in said.stdout.splitlines()}
    assert all(expected in lines[stage] for stage, expected in faults.items())
    assert all("as published" in lines[stage] for stage in STAGES if stage not in stages)

    done = built.make("all", "RECIPE=tiny", "VERIFY=1").stdout
    for stage, expected in faults.items():
        reasons = next(line for line in done.splitlines() if line.startswith(f"{stage}: "))
        assert expected in reasons and f"{stage}: published" in done
    assert {stage: built.manifest(stage)["content"] for stage in same} == before
    for stage in STAGES:
        assert stage in stages or f"{stage}: published" not in done
    assert built.make("verify", "RECIPE=tiny").stdout.count("as published") == len(STAGES)


def test_a_flipped_bit_in_the_trained_shards_stops_consolidation_and_leaves_its_former_output(
    built: Project, torture: Torture
) -> None:
    shards, change = (
        built.folder / "outputs/tiny/train/shards",
        ("RECIPE=tiny", "MAX_SHARD_SIZE=100kB"),
    )
    file = max(shards.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    whole, before = file.read_bytes(), built.manifest("consolidate")
    for _ in range(torture.times(1, 10)):
        place = torture.random.randrange(len(whole) // 4, len(whole) * 3 // 4)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        done = built.make("consolidate", *change, check=False)
        assert (
            done.returncode == 2
            and f"shards/{file.name} has other bytes" in done.stderr
            and "VERIFY=1" in done.stderr
        )
        assert "Traceback" not in done.stderr
        assert (
            built.manifest("consolidate") == before
            and damage_of(built.folder / "outputs/tiny/consolidate") == []
        )
        torture.count()


# Checkpoints.


def remove_its_list(folder: Path, file: Path, chance: random.Random) -> str:
    (folder / "files.json").unlink()
    return "files.json, is missing"


def empty_the_folder(folder: Path, file: Path, chance: random.Random) -> str:
    for path in folder.iterdir():
        path.unlink()
    return "files.json, is missing"


def garble_its_list(folder: Path, file: Path, chance: random.Random) -> str:
    (folder / "files.json").write_bytes(
        chance.choice(
            [b"[]", b"{", b"\xff", b"{}", b'{"a": 3}', b'{"a\\u0000": {"bytes": 1, "sha256": ""}}']
        )
    )
    return "damaged"


CHECKPOINT_FAULTS: list[Callable] = [
    flip_a_bit,
    truncate,
    remove,
    fill_with_zeros,
    remove_its_list,
    empty_the_folder,
    garble_its_list,
]


def a_checkpoint_file(checkpoint: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(path for path in checkpoint.iterdir() if path.name != "files.json"))


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_a_training_goes_on_from_the_last_checkpoint_that_is_whole(
    fault,
    one_rank,
    tmp_path,
    torture: Torture,
    capsys,
) -> None:
    for step in (2, 4, 6):
        checkpoint_of(tmp_path / "written", step, keep=3)
    for _ in range(torture.times(2, 40)):
        folder = shutil.copytree(tmp_path / "written", tmp_path / "checkpoints")
        damaged = sorted(folder.iterdir(), reverse=True)[: torture.random.randrange(1, 4)]
        expected = [
            fault(path, a_checkpoint_file(path, torture.random), torture.random) for path in damaged
        ]
        left = 6 - 2 * len(damaged)
        assert resumed(folder)[0] == left
        said = capsys.readouterr().err
        assert all(
            path.name in said and wrong in said
            for path, wrong in zip(damaged, expected, strict=True)
        )
        assert (f"continuing from step {left}" if left else "starting again") in said
        assert resumed(folder)[0] == left and capsys.readouterr().err == "", (
            "what was damaged is named once"
        )
        checkpoint_of(folder, 8, keep=1)
        assert resumed(folder) == (8, 8.0)
        torture.count()
        shutil.rmtree(folder)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_that_resumes_after_a_damaged_checkpoint_ends_with_the_same_shards(
    processes: int,
    base: Settings,
    data: Path,
    tmp_path: Path,
    torture: Torture,
    capfd,
    monkeypatch,
) -> None:
    if processes == 1 and not torture.long:
        pytest.skip("two processes show it too: make torture plays both")
    monkeypatch.chdir(ROOT)
    settings = replace(base, nproc_per_node=processes, save_steps=2, max_steps=8, eval_steps=0)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    command = training_command(
        settings, base_model_folder(settings), data, undisturbed, max_steps=-1
    )
    subprocess.run(
        command, env={**os.environ, **environment(settings)}, check=True, stderr=subprocess.DEVNULL
    )
    expected = shards(undisturbed)
    assert [path.name for path in sorted((undisturbed / "checkpoints").iterdir())] == [
        "step-00000004",
        "step-00000006",
    ]
    for number, fault in enumerate(torture.random.sample(CHECKPOINT_FAULTS, torture.times(1, 3))):
        work = tmp_path / f"work-{number}"
        shutil.copytree(undisturbed, work)
        shutil.rmtree(work / "shards")
        last = work / "checkpoints" / "step-00000006"
        fault(last, a_checkpoint_file(last, torture.random), torture.random)
        train(settings, data, tmp_path, work)
        said = capfd.readouterr().err
        assert "step-00000006 is damaged" in said and "continuing from step 4" in said
        assert shards(work) == expected
        steps = [
            json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()
        ]
        assert steps == list(range(1, 9))
        torture.count()
