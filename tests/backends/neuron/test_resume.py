"""What an interrupted training on Neuron left, and where the next one begins."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from stages.backends.neuron.resume import (
    INTERRUPTED,
    Start,
    choose_start,
    finished,
    last_checkpoint,
)
from stages.backends.neuron.train import _stopped
from stages.run.errors import InputError, Stopped
from stages.run.layout import STOP_FILE
from stages.run.settings import Settings
from tests.torture.plugin import Torture

TOTAL = 10


@pytest.fixture
def base(written_shards: Path) -> Path:
    return written_shards / "tp2" / "original"


@pytest.fixture
def work(written_shards: Path, tmp_path: Path) -> Path:
    """Train's work folder with checkpoints of steps 2 and 4, and one of step 6 that was cut off."""
    for step in (2, 4, 6):
        shutil.copytree(
            written_shards / "tp2" / "shards",
            tmp_path / "checkpoints" / f"checkpoint-{step}" / "shards",
        )
    (tmp_path / "checkpoints" / "checkpoint-6" / "shards" / "done").unlink()
    return tmp_path


def settings(base: Path, resume: str, lora_r: int = 0) -> Settings:
    return Settings(model_id=str(base), resume=resume, lora_r=lora_r)


def test_the_last_whole_checkpoint_counts(work: Path) -> None:
    step, shards = last_checkpoint(work / "checkpoints") or (0, Path())
    assert (step, shards) == (4, work / "checkpoints" / "checkpoint-4" / "shards")


def test_a_training_begins_anew_and_says_what_could_be_gone_on_with(
    work: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose_start(settings(base, "restart"), work, TOTAL) == Start(base, 0)
    said = capsys.readouterr().out
    assert (
        "step 4 of 10" in said and "RESUME=weights" in said and "float32 weights are lost" in said
    )


def test_the_interrupted_checkpoints_stay_until_others_have_come_as_far(
    work: Path, base: Path
) -> None:
    choose_start(settings(base, "restart"), work, TOTAL)
    assert last_checkpoint(work / INTERRUPTED) and not (work / "checkpoints").exists()
    (work / "checkpoints" / "checkpoint-1").mkdir(parents=True)  # killed while it wrote its first
    choose_start(settings(base, "restart"), work, TOTAL)
    assert (last_checkpoint(work / INTERRUPTED) or (0,))[0] == 4
    shutil.copytree(
        work / INTERRUPTED / "checkpoint-2", work / "checkpoints" / "checkpoint-2"
    )  # came less far than the first
    choose_start(settings(base, "restart"), work, TOTAL)
    assert (last_checkpoint(work / INTERRUPTED) or (0,))[0] == 4
    shutil.copytree(work / INTERRUPTED / "checkpoint-2", work / "checkpoints" / "checkpoint-8")
    choose_start(settings(base, "restart"), work, TOTAL)
    assert (last_checkpoint(work / INTERRUPTED) or (0,))[0] == 8


def test_weights_are_gone_on_with_when_that_is_asked_for(work: Path, base: Path) -> None:
    start = choose_start(settings(base, "weights"), work, TOTAL)
    assert start.step == 4
    weights, expected = (
        load_file(start.base / "model.safetensors"),
        load_file(base / "model.safetensors"),
    )
    assert weights.keys() == expected.keys() and all(
        bool((weights[name] == expected[name]).all()) for name in expected
    )
    assert (
        choose_start(settings(base, "weights"), work, TOTAL) == start
    )  # killed before its first checkpoint: again from there


def test_weights_that_are_not_there_are_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InputError, match="no interrupted training"):
        choose_start(settings(base, "weights"), tmp_path, TOTAL)


def flip_a_bit(shards: Path, chance: random.Random) -> None:
    """In the middle of a large tensor, where neither the archive's directory nor its pickle
    lies."""
    file = max(shards.rglob("tensor_*.pt"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 + chance.randrange(-100, 100)] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def truncate(shards: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(shards.rglob("tensor_*.pt")))
    os.truncate(file, chance.randrange(file.stat().st_size))


def remove_a_tensor(shards: Path, chance: random.Random) -> None:
    chance.choice(sorted(shards.rglob("tensor_*.pt"))).unlink()


def fill_with_zeros(shards: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(shards.rglob("tensor_*.pt")))
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.torture("damage")
@pytest.mark.parametrize("fault", [flip_a_bit, truncate, remove_a_tensor, fill_with_zeros])
def test_weights_are_taken_from_the_checkpoint_before_a_damaged_one(
    fault: Callable,
    work: Path,
    base: Path,
    torture: Torture,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(torture.times(1, 10)):
        copy = shutil.copytree(work, tmp_path_factory.mktemp("damaged") / "work")
        fault(copy / "checkpoints" / "checkpoint-4" / "shards", torture.random)
        assert choose_start(settings(base, "weights"), copy, TOTAL).step == 2
        said = capsys.readouterr().out
        assert (
            "the checkpoint of step 4 is damaged and removed: " in said
            and "continuing from the weights of step 2 of 10" in said
        )
        fault(copy / INTERRUPTED / "checkpoint-2" / "shards", torture.random)
        shutil.rmtree(copy / "resumed")
        with pytest.raises(InputError, match=r"no interrupted training.*Set RESUME=restart"):
            choose_start(settings(base, "weights"), copy, TOTAL)
        torture.count(2)


@pytest.mark.torture("damage")
@pytest.mark.parametrize("folder", ["shards", "saved/shards"])
def test_a_training_that_ended_is_not_trusted_when_its_shards_are_damaged(
    folder: str, work: Path, torture: Torture
) -> None:
    assert not finished(work)
    shutil.copytree(work / "checkpoints" / "checkpoint-4" / "shards", work / folder)
    assert finished(work)
    flip_a_bit(work / folder, torture.random)
    assert not finished(work) and not (work / folder).exists()


def test_a_limit_says_with_what_it_is_gone_on(tmp_path: Path) -> None:
    assert _stopped(tmp_path) is None
    (tmp_path / STOP_FILE).write_text("Stopped\nEC2 takes this spot instance away.")
    error = _stopped(tmp_path)
    assert isinstance(error, Stopped) and "that needs RESUME=weights" in str(error)
