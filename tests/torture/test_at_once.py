"""Two makes at once: in one run the second waits and says for whom, in two runs both work, and each
gives what one gives alone."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest

from stages.run.setting import STAGES
from tests.conftest import Project, clean_environment
from tests.torture import processes
from tests.torture.plugin import Torture

pytestmark = pytest.mark.torture("two at once")
WAITS = re.compile(r"waiting for (\S+) \(process \d+ on \S+, since \d\d:\d\d:\d\d\)")
# Publish how long something took, and what inductor never writes in the same bytes twice.
DIFFERING = ("precompile", "compile-inference")


def start(project: Project, *arguments: str) -> subprocess.Popen:
    """A make that works in the background; what it says goes to a file, which `said` reads."""
    log = project.folder / f"{len(list(project.folder.glob('*.log')))}.log"
    with log.open("w") as file:
        make = subprocess.Popen(
            ["make", *arguments],
            cwd=project.folder,
            env=clean_environment(),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    make.log = log  # type: ignore[attr-defined]
    return make


def said(make: subprocess.Popen) -> str:
    return make.log.read_text()  # type: ignore[attr-defined]


def require_same(project: Project, stages: tuple[str, ...], run: str, other: str) -> None:
    for stage in stages:
        if stage not in DIFFERING:
            assert (
                project.manifest(stage, run)["content"] == project.manifest(stage, other)["content"]
            ), stage


def test_two_makes_in_one_run_give_what_one_gives(built: Project, torture: Torture) -> None:
    stages = STAGES[: torture.times(3, 6)]
    goal = stages[-1]
    two = [start(built, goal, "RECIPE=tiny", "RUN=shared") for _ in range(2)]
    statuses = [make.wait() for make in two]
    outputs = [said(make) for make in two]
    assert statuses == [0, 0], outputs
    for stage in stages:
        assert sorted(f"{stage}: published" in output for output in outputs) == [False, True], (
            outputs
        )
    assert any(WAITS.search(output) for output in outputs), outputs
    require_same(built, stages, "shared", "tiny")


def test_makes_in_two_runs_work_at_once_and_share_what_is_cached(
    built: Project, torture: Torture
) -> None:
    stages = STAGES[: torture.times(2, 4)]
    models = built.folder / "outputs" / ".cache" / "models"
    for path in models.rglob("*.safetensors"):
        path.unlink()
    subprocess.run(["rm", "-r", str(models)], check=True)
    two = [start(built, stages[-1], "RECIPE=tiny", f"RUN={run}") for run in ("one", "two")]
    made = processes.wait_for(
        lambda: [
            path.stat().st_ino
            for path in models.glob("*")
            if path.is_dir() and "." not in path.name
        ],
        120,
    )
    assert [make.wait() for make in two] == [0, 0], [said(make) for make in two]
    assert [path.stat().st_ino for path in models.glob("*") if path.is_dir()] == made, (
        "the random model was made twice"
    )
    assert not any(re.search("(data|precompile|train).*waiting", said(make)) for make in two), (
        "a run waited for the other"
    )
    require_same(built, stages, "one", "tiny")
    require_same(built, stages, "two", "tiny")


def test_a_make_that_waits_goes_on_when_the_other_is_killed(
    built: Project, torture: Torture
) -> None:
    torture.require_long()
    stages = STAGES[:4]
    settings = ("RECIPE=tiny", "RUN=shared")
    first = start(built, "train", *settings)
    assert processes.wait_for(
        lambda: "$ python" in said(first), 120, lambda: first.poll() is None
    ), said(first)
    second = start(built, stages[-1], *settings)
    waiting = processes.wait_for(
        lambda: WAITS.search(said(second)), 120, lambda: second.poll() is None
    )
    assert waiting, said(second)
    first.send_signal(torture.random.choice([signal.SIGKILL, signal.SIGTERM]))
    assert first.wait() != 0 and second.wait() == 0, said(second)
    require_same(built, stages, "shared", "tiny")
    left = {path.name for path in Path(built.folder, "outputs", "shared").iterdir()}
    assert left == {*stages, ".lock"}
