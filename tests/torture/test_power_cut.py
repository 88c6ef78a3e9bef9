"""A power cut at any point of a publication or of a checkpoint leaves the former one or the new
one, whole."""

from __future__ import annotations

import functools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.run import provenance
from stages.run import publish as publishing
from stages.run.manifest import file_problems, manifest_of
from stages.run.publish import StageResult, publish, remove_published
from stages.run.settings import Settings
from tests.torture.checkpoints import checkpoint_of, resumed
from tests.torture.plugin import Torture
from tests.torture.power_cut import Moment, paused, recording

pytestmark = pytest.mark.torture("power cuts")

# Of the names, and of the contents, that no flush made certain: which have reached the disk.
CUTS = [("none", "none"), ("all", "none"), ("none", "all"), ("some", "none"), ("some", "some")]
ONE, TWO, THREE = Settings(max_length=64), Settings(max_length=128), Settings(max_length=256)


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, faster: the code is analysed once."""
    monkeypatch.setattr(provenance, "code_of", functools.cache(provenance.code_of))
    monkeypatch.setattr(publishing, "_installed", functools.cache(publishing._installed))


def builds(seed: int) -> Callable[[Path], StageResult]:
    """A build that writes a tree of its own."""

    def build(work: Path) -> StageResult:
        chance = random.Random(seed)
        for number in range(chance.randrange(2, 6)):
            folder = work.joinpath(
                *(f"folder-{chance.randrange(3)}" for _ in range(chance.randrange(3)))
            )
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"file-{number}").write_bytes(chance.randbytes(chance.randrange(1, 200)))
        (work / "part").mkdir()
        (work / "part" / "shard").write_bytes(chance.randbytes(50))
        return StageResult()

    return build


def run(output: Path, settings: Settings, seed: int = 0) -> bool:
    return publish("data", settings, {}, output, builds(seed))


def first(output: Path, seed: int) -> None:
    run(output, TWO, seed)


def replacement(output: Path, seed: int) -> None:
    run(output, TWO, seed)


def removal(output: Path, seed: int) -> None:
    remove_published(output, "part", because="KEEP_SHARDS=0")


WORK = {
    "first publication": first,
    "replacement": replacement,
    "replacement by two renames": replacement,
    "removal of a part": removal,
}


@pytest.fixture
def moments(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    torture: Torture,
):
    """Records what is done in a new folder."""

    def record_it(what: str, flushes: bool = True) -> list[Moment]:
        folder, seed = tmp_path / "recorded", torture.random.randrange(2**32)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        output = folder / "outputs" / "run" / "data"
        if what != "first publication":
            run(output, ONE, seed + 1)
        exchange = publishing._exchange

        def watched(
            one: Path, other: Path
        ) -> bool:  # it calls the C library, which raises no audit event
            if what == "replacement by two renames":
                return False
            with paused():
                done = exchange(one, other)
            with paused():
                return done

        with monkeypatch.context() as patch, recording(folder, flushes) as recorder:
            patch.setattr(publishing, "_exchange", watched)
            WORK[what](output, seed)
        return recorder.moments

    return record_it


@pytest.fixture
def laid_out(
    tmp_path: Path, torture: Torture
) -> Callable[[list[Moment]], Iterator[tuple[Path, Moment]]]:
    """Every cut of some moments, as a folder."""

    def each(moments: list[Moment]) -> Iterator[tuple[Path, Moment]]:
        for moment in moments:
            for names, contents in CUTS:
                folder = tmp_path / "after the cut"
                moment.lay_out(folder, names, contents, torture.random)
                torture.count()
                yield folder, moment
                shutil.rmtree(folder)

    return each


def problems(output: Path, what: str, finished: bool) -> list[str]:
    """What is not as it should be in an output after a cut."""
    manifest = manifest_of(output)
    if manifest is None:
        may_be_missing = (
            what in ("first publication", "replacement by two renames") and not finished
        )
        return [] if may_be_missing and not output.exists() else ["there is no output"]
    found = [
        wrong
        for wrong in file_problems(manifest, output, read=True)
        if not wrong.endswith("was not published")
    ]
    length, removed = manifest["provenance"]["settings"]["MAX_LENGTH"], "removed" in manifest
    new = removed if what == "removal of a part" else length == TWO.max_length
    return found + (["what had been published is gone"] if finished and not new else [])


@pytest.mark.parametrize("what", WORK)
def test_a_power_cut_leaves_the_former_output_or_the_new_one(
    what: str, moments, laid_out, torture: Torture, monkeypatch
) -> None:
    for _ in range(torture.times(1, 6)):
        recorded = moments(what)
        assert recorded[-1].finished
        with monkeypatch.context() as patch:
            patch.setattr(
                os, "fsync", lambda descriptor: None
            )  # what is published after the cut need not outlive another
            for number, (folder, moment) in enumerate(laid_out(recorded)):
                output = folder / "outputs" / "run" / "data"
                assert problems(output, what, moment.finished) == []
                if number % torture.times(10, 3) == 0:
                    run(output, THREE)
                    assert file_problems(manifest_of(output) or {}, output, read=True) == []
                    left = {path.name for path in output.parent.iterdir()}
                    assert left - {".history"} == {"data", ".lock"}


@pytest.mark.parametrize("what", WORK)
def test_without_flushing_a_power_cut_would_leave_something_else(
    what: str, moments, laid_out
) -> None:
    """That what is played above can go wrong at all."""
    cuts = laid_out(moments(what, flushes=False))
    assert any(
        problems(folder / "outputs" / "run" / "data", what, moment.finished)
        for folder, moment in cuts
    )


def test_the_former_output_is_there_again_after_a_cut_between_two_renames(
    moments, laid_out
) -> None:
    between = [moment for moment in moments("replacement by two renames") if _is_between(moment)]
    assert between
    for folder, _ in laid_out(between):
        output = folder / "outputs" / "run" / "data"
        if not output.exists():
            assert not run(output, ONE), "the former output was made again"


def _is_between(moment: Moment) -> bool:
    return any(name.endswith(".former") for operation in moment.possible for _, name in operation)


def recorded_checkpoint(folder: Path, flushes: bool = True) -> list[Moment]:
    folder.mkdir()
    checkpoint_of(folder / "checkpoints", 2)
    with recording(folder, flushes) as recorder:
        checkpoint_of(folder / "checkpoints", 4)
    return recorder.moments


def test_a_power_cut_leaves_a_whole_checkpoint(one_rank, laid_out, tmp_path: Path) -> None:
    for folder, moment in laid_out(recorded_checkpoint(tmp_path / "recorded")):
        step, weight = resumed(folder / "checkpoints")
        assert step == weight and step in ((4,) if moment.finished else (2, 4))


def test_a_training_whose_checkpoints_were_never_flushed_would_begin_anew(
    one_rank,
    laid_out,
    tmp_path: Path,
) -> None:
    cuts = laid_out(recorded_checkpoint(tmp_path / "recorded", flushes=False))
    assert any(resumed(folder / "checkpoints")[0] == 0 for folder, _ in cuts)
