"""Sends the lines of metrics.jsonl to the tracker while the training writes them.

The stage follows the file, for every backend alike. So no rank loads the tracker's library or waits
for its server, a training whose ranks are killed is still marked as failed, and what was written
while the server could not be reached is sent later.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

from stages.backends.metrics import lines_after
from stages.run.backend import choose
from stages.run.json_file import write_json
from stages.run.layout import METRICS_FILE
from stages.run.settings import SECRET, Settings
from stages.track.libraries import Run, Tracker, open_run

# Which run of which tracker has the metrics, and up to which step. In train's work folder, where it
# survives a kill, and then published with the shards.
TRACKER_FILE = "tracker.json"
_WRITING = f"{TRACKER_FILE}.writing"
POLL_SECONDS = 1.0
RETRY_SECONDS = 60.0  # after the first failure; then twice as long each time
# How long the end of a training waits for the last points, and that of a failed one.
LAST_SECONDS, FAILED_SECONDS = 60.0, 10.0
LINES_AT_ONCE = 100  # MLflow takes 1,000 values in a call


@contextmanager
def followed(settings: Settings, work: Path, run_folder: Path) -> Iterator[None]:
    """Within it, the metrics that a training writes to `work` go to TRACKER.

    No failure of the tracker ends the training: it is said once, and tried again.
    """
    (work / _WRITING).unlink(missing_ok=True)  # of a run that was killed
    if settings.tracker == "none":
        yield
        return
    follower = Follower(settings, work, run_folder)
    follower.start()
    try:
        yield
    except KeyboardInterrupt:
        follower.end("killed", FAILED_SECONDS)
        raise
    except BaseException:
        follower.end("failed", FAILED_SECONDS)
        raise
    follower.end("finished", LAST_SECONDS)


class Follower(Thread):
    """The thread that opens the run, sends what is new, and opens it again when that failed."""

    def __init__(self, settings: Settings, work: Path, run_folder: Path):
        super().__init__(name="tracker", daemon=True)
        self._tracker, self._work = settings.tracker, work
        self._metrics = work / METRICS_FILE
        self._run = _run(settings, work, run_folder)
        self._ended, self._status = Event(), "finished"
        self._failed = self._abandoned = self._said = False

    def run(self) -> None:
        pause = RETRY_SECONDS
        while True:
            try:
                self._send_until_ended()
                return
            except (Exception, SystemExit) as error:
                if not self._failed:
                    self._say(
                        f"failed, and the training goes on without it. {_reason(error)} "
                        f"{METRICS_FILE} has every step; they are sent if it works again."
                    )
                self._failed = True
            if self._ended.is_set():  # this was the last try
                return
            self._ended.wait(pause)
            pause *= 2

    def end(self, status: str, seconds: float) -> None:
        """Wait at most `seconds` until the last lines are sent and the run is closed."""
        self._status = status
        self._ended.set()
        self.join(seconds)
        missing = len(lines_after(self._metrics, self._run.step))
        if self.is_alive() or (self._failed and missing):
            late = f" after {seconds:g} s" if self.is_alive() else ""
            self._say(f"lacks the last {missing:,} logged steps{late}; {METRICS_FILE} has them.")
        elif self._failed:
            self._say("works again, and has every step.")
        self._abandoned = self.is_alive()

    def _send_until_ended(self) -> None:
        # A training that is refused before a rank starts makes no run.
        while not self._metrics.exists():
            if self._ended.wait(POLL_SECONDS) and not self._metrics.exists():
                return
        tracker = open_run(self._tracker, self._run)
        try:
            self._run = replace(self._run, id=tracker.id, step=tracker.step)
            self._remember()
            if not self._said:
                self._say(_masked(tracker.place))
            self._said = True
            self._send(tracker)
        except BaseException:
            with suppress(Exception):
                tracker.close("failed")
            raise
        tracker.close(self._status)

    def _send(self, tracker: Tracker) -> None:
        ended = False
        while not ended:
            ended = self._ended.is_set()  # before the file is read: its last lines are sent too
            lines = lines_after(self._metrics, self._run.step)
            for start in range(0, len(lines), LINES_AT_ONCE):
                some = lines[start : start + LINES_AT_ONCE]
                tracker.log(some)
                self._run = replace(self._run, step=some[-1]["step"])
                self._remember()
            if not ended:
                self._ended.wait(POLL_SECONDS)

    def _remember(self) -> None:
        if not self._abandoned:  # else the folder is being published
            state = {"tracker": self._tracker, "run": self._run.id, "step": self._run.step}
            write_json(self._work / _WRITING, state)
            os.replace(self._work / _WRITING, self._work / TRACKER_FILE)

    def _say(self, text: str) -> None:
        if not self._abandoned:
            print(f"tracker: {self._tracker}: {text}", flush=True)


def _run(settings: Settings, work: Path, run_folder: Path) -> Run:
    """The run to open: that which an interrupted training left in `work`, or a new one."""
    values = {**settings.affecting("data"), **settings.affecting("train")}
    run = Run(run_folder.name, run_folder, {**values, "BACKEND": choose(settings).name})
    try:
        state = json.loads((work / TRACKER_FILE).read_text(encoding="utf-8"))
        if state["tracker"] == settings.tracker:
            return replace(run, id=str(state["run"]), step=int(state["step"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or a crash damaged it
    return run


def _reason(error: BaseException) -> str:
    """The first line of an error, without what nobody may read, as a sentence."""
    first = (str(error).strip().splitlines() or [""])[0][:300].rstrip(".")
    return _masked(f"{type(error).__name__}: {first}.")


def _masked(text: str) -> str:
    """`text` without the passwords of URLs and the values of variables that hold secrets."""
    for name, value in os.environ.items():
        if SECRET.fullmatch(name) and re.search("TOKEN|SECRET|PASSWORD|KEY", name) and value:
            text = text.replace(value, "***")
    return re.sub(r"//[^/@\s]+@", "//***@", text)
