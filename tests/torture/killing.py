"""One run that is killed again and again: in which stage, whom, by what, when, and what has to be
true after each kill."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from stages.run.digests import file_digest
from stages.run.setting import STAGES
from tests.conftest import Project, clean_environment, copy_project
from tests.torture import processes
from tests.torture.plugin import Torture

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Whom a person interrupts. A library may swallow SIGINT, and then the program just works on.
INTERRUPTED = ("stage", "make")
# The demo, shortened: one pass over its rows, and a checkpoint every second step.
DEMO = (
    "RECIPE=demo",
    "BF16=0",
    "NUM_TRAIN_EPOCHS=1",
    "SAVE_STEPS=2",
    "EVAL_STEPS=8",
    "LOGGING_STEPS=5",
    "MAX_NEW_TOKENS=8",
)
SURVIVAL_SECONDS = 10  # after a kill nothing of its make may live longer
# Whom a signal goes to, by a part of the command line.
PROGRAMS = {
    "launcher": "stages.backends.torch.torchrun",
    "rank": "stages.backends.torch.worker",
    "compiling process": "multiprocessing.forkserver",
}
VICTIMS = {
    stage: ("stage", "make", *below)
    for stage, below in zip(
        STAGES,
        ((), ("launcher", "rank"), ("launcher", "rank"), (), ("compiling process",), ()),
        strict=True,
    )
}


@dataclass(frozen=True)
class Kill:
    """A signal for a victim in a stage, when something is on the disk (`once`, a pattern in the
    run's folder) or after a while."""

    stage: str
    victim: str
    sign: signal.Signals
    once: str | None
    part: float  # of the time that the stage takes

    def __str__(self) -> str:
        when = f"once {self.once} is there" if self.once else f"after {self.part:.0%} of its time"
        return f"{self.sign.name} to the {self.victim} of {self.stage} {when}"


def every_kill(chance: random.Random) -> list[Kill]:
    """Each signal for each victim in each stage, in the order of the stages, at moments of
    chance."""
    return [
        Kill(stage, victim, sign, _moment(stage, victim, chance), chance.random())
        for stage in STAGES
        for victim, sign in itertools.product(VICTIMS[stage], SIGNALS)
        if sign != signal.SIGINT or victim in INTERRUPTED
    ]


def _moment(stage: str, victim: str, chance: random.Random) -> str | None:
    checkpoints = (
        [f".work/train-*/checkpoints/step-*{end}" for end in ("", ".writing")]
        if stage == "train"
        else []
    )
    # When it publishes, nothing is left of what it started.
    ends = (
        [f".work/{stage}-*/manifest.json", f"{stage}/manifest.json"]
        if victim in ("stage", "make")
        else []
    )
    return chance.choice([None, None, *checkpoints, *ends])


@dataclass
class Killing:
    """A run of `project` and its story: what was done to it, and what it answered. `seconds`: what
    each stage takes."""

    project: Project
    settings: tuple[str, ...]
    run: str
    seed: int
    seconds: dict[str, float]
    story: list[str] = field(default_factory=list)
    output: str = ""

    @property
    def folder(self) -> Path:
        return self.project.folder / "outputs" / self.run

    def kill(self, kill: Kill) -> None:
        """Make the kill's stage and kill its victim there, however many tries it takes to hit one
        that lives."""
        for attempt in range(5):
            self.story.append(f"{kill}, attempt {attempt + 1}")
            if (self.folder / kill.stage / "manifest.json").exists():
                shutil.rmtree(
                    self.folder / kill.stage
                )  # published before it could be killed, or by a kill that came just after
            # Else compile-inference has nothing to compile.
            shutil.rmtree(self.project.folder / "outputs/.cache/packages", ignore_errors=True)
            # What happens at the end of a stage may be over before a signal has any effect: then
            # earlier, by the clock.
            if self._killed(kill if attempt < 2 else replace(kill, once=None), 0.5**attempt):
                return
        raise AssertionError(self.told(f"{kill}: always too late"))

    def make(self, goal: str) -> None:
        """Go on to the end of `goal`: no cleaning by hand, and what was finished is not made
        again."""
        before = self.published()
        self.story.append(f"make {goal}")
        make, mark = self._start(goal)
        assert make.wait(600) == 0, self.told("the next make failed")
        self._check(before, mark, time.monotonic())

    def published(self) -> dict[str, tuple[int, int]]:
        """Stage -> inode and time of its manifest."""
        stats = {stage: self.folder / stage / "manifest.json" for stage in STAGES}
        return {
            stage: (path.stat().st_ino, path.stat().st_mtime_ns)
            for stage, path in stats.items()
            if path.exists()
        }

    def told(self, problem: str) -> str:
        output = Path(self.output).read_text(errors="replace") if self.output else ""
        history = "\n".join(f"{number:3} {line}" for number, line in enumerate(self.story, 1))
        return (
            f"{problem}\nTORTURE_SEED={self.seed}, {' '.join(self.settings)}\n{history}\n--- "
            f"the last make's output\n{output}"
        )

    def _start(self, goal: str) -> tuple[subprocess.Popen, str]:
        mark = f"{self.run}-{len(self.story)}"
        self.output = str(self.project.folder / f"{mark}.log")
        environment = {**clean_environment(), processes.MARK: f"{self.project.folder}/{mark}"}
        with open(self.output, "w") as file:
            command = ["make", goal, f"RUN={self.run}", *self.settings]
            make = subprocess.Popen(
                command,
                cwd=self.project.folder,
                env=environment,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_heed_interrupts,  # noqa: PLW1509 (nothing here has threads)
            )
        return make, environment[processes.MARK]

    def _killed(self, kill: Kill, share: float) -> bool:
        before = self.published()
        # What a stage starts is there for a part of its time.
        delay = (
            kill.part * self.seconds[kill.stage] * (0.4 if kill.victim in PROGRAMS else 0.9) * share
        )
        make, mark = self._start(kill.stage)
        going = lambda: make.poll() is None  # noqa: E731
        victim = processes.wait_for(
            lambda: self._victim(kill, make.pid, mark), 300, going, every=0.02
        )
        if isinstance(victim, int):
            if kill.once:
                processes.wait_for(lambda: any(self.folder.glob(str(kill.once))), 300, going)
            else:
                processes.wait_for(lambda: False, delay, going)
        sent = isinstance(victim, int) and processes.send(
            victim, kill.sign, kill.victim == "make" and kill.sign == signal.SIGINT
        )
        since = time.monotonic()
        if not sent:
            assert make.wait(600) == 0, self.told("a make that nobody killed failed")
        self._check(before, mark, since, make)
        if sent and make.returncode:
            if kill.victim == "rank" and kill.sign == signal.SIGKILL:
                assert "was killed by SIGKILL" in Path(self.output).read_text(), self.told(
                    "the cause is not named"
                )
            self.story[-1] += f": hit after {delay:.2f} s" if not kill.once else ": hit"
            return True
        return False

    def _victim(self, kill: Kill, make: int, mark: str) -> int | None:
        """The process to kill, once the stage has begun."""
        stage = self._stage(make, kill.stage)
        if stage is None or kill.victim in ("stage", "make"):
            return make if stage and kill.victim == "make" else stage
        found = [
            pid
            for pid, line in processes.living(mark).items()
            if PROGRAMS[kill.victim] in line
            and (kill.victim != "rank" or PROGRAMS["launcher"] not in line)
        ]
        if kill.victim == "compiling process":
            # Not the server that forks them: where it is killed, the stage starts another.
            found = [pid for pid in found if processes.forked_by(pid, found)]
        return found[int(kill.part * len(found))] if found else None

    def _stage(self, make: int, stage: str) -> int | None:
        try:
            children = Path(f"/proc/{make}/task/{make}/children").read_text().split()
            module = f"-m stages.{stage.replace('-', '_')} "
            return next(
                (int(pid) for pid in children if module in processes.command_line(int(pid))), None
            )
        except OSError:
            return None

    def _check(
        self,
        before: dict[str, tuple[int, int]],
        mark: str,
        since: float,
        make: subprocess.Popen | None = None,
    ) -> None:
        gone = processes.wait_for(
            lambda: (make is None or make.poll() is not None) and not processes.living(mark),
            since + SURVIVAL_SECONDS - time.monotonic(),
        )
        if not gone:
            left = processes.living(mark)
            for pid in left:
                processes.send(pid, signal.SIGKILL)
            raise AssertionError(self.told(f"alive {SURVIVAL_SECONDS} s after the kill: {left}"))
        after = self.published()
        assert {stage: after.get(stage) for stage in before} == before, self.told(
            "a finished stage was made again"
        )
        for stage in after:
            self._require_whole(stage)

    def _require_whole(self, stage: str) -> None:
        manifest = json.loads((self.folder / stage / "manifest.json").read_bytes())
        files = {
            path.relative_to(self.folder / stage).as_posix()
            for path in (self.folder / stage).rglob("*")
            if path.is_file()
        }
        assert files == {*manifest["outputs"], "manifest.json"}, self.told(
            f"{stage} is not what its manifest says"
        )
        for name, facts in manifest["outputs"].items():
            assert file_digest(self.folder / stage / name) == facts["sha256"], self.told(
                f"{stage}/{name} has another content"
            )


def _heed_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and so would all that these tests
    start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def undisturbed(project: Project, settings: tuple[str, ...], run: str) -> dict[str, float]:
    """Make every stage in a run that nobody disturbs; what each takes here, in seconds."""
    seconds = {}
    for stage in STAGES:
        started = time.monotonic()
        project.make(stage, f"RUN={run}", *settings)
        seconds[stage] = time.monotonic() - started
    return seconds


def require_undisturbed(killing: Killing, run: str) -> None:
    """The killed run's weights are bitwise those of `run`, and nothing lies about."""
    expected = killing.project.folder / "outputs" / run / "consolidate" / "model.safetensors"
    found = killing.folder / "consolidate" / "model.safetensors"
    assert found.read_bytes() == expected.read_bytes(), killing.told(
        "the weights are not those of an undisturbed run"
    )
    assert set(os.listdir(killing.folder)) <= {*STAGES, ".lock"}, killing.told(
        f"left: {os.listdir(killing.folder)}"
    )


def killed_demo(torture: Torture, folder: Path, layout: tuple[str, ...], half: int) -> None:
    """Every other kill of `every_kill`, from the first or the second on, in the demo with a model
    of one layer."""
    project = copy_project(folder / "project")
    config = project.folder / "data" / "demo" / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 1}))
    settings = (*DEMO, *layout)
    killing = Killing(
        project, settings, "killed", torture.seed, undisturbed(project, settings, "undisturbed")
    )
    for kill in every_kill(torture.random)[half::2]:
        killing.kill(kill)
        torture.count()
    killing.make("all")
    require_undisturbed(killing, "undisturbed")
    print(killing.told("every kill"))
