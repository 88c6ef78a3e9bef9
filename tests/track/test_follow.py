"""Training's metrics in the experiment tracker, read back with its own library."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from stages.backends.metrics import Metrics
from stages.run.errors import InputError
from stages.run.settings import Settings
from stages.track import follow
from stages.track.follow import TRACKER_FILE, followed
from stages.track.libraries import Run
from tests.conftest import ROOT
from tests.torture.canaries import CANARIES, held, holding

LOSSES = {step: 1 / 2**step for step in range(1, 9)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(follow, "RETRY_SECONDS", 0.02)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "outputs" / "demo" / "work").mkdir(parents=True)


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow makes a new database in some seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow(empty_mlflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from mlflow import MlflowClient

    path = tmp_path / "outputs" / "mlflow.db"
    shutil.copyfile(empty_mlflow, path)
    # Whole, because MLflow keeps an open database by its name.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    return MlflowClient(tracking_uri=f"sqlite:///{path}")


def tracked(
    tracker: str, first: int, last: int, end: Callable[[], None] = lambda: None, **settings: Any
) -> Path:
    """A training that writes the steps after `first`, up to `last`, and then calls `end`."""
    run_folder = Path("outputs/demo")
    work = run_folder / "work"
    with followed(Settings(tracker=tracker, backend="torch", **settings), work, run_folder):
        metrics = Metrics(work / "metrics.jsonl", first, writes=True)
        for step in range(first + 1, last + 1):
            metrics.write({"step": step, "epoch": step / 8, "loss": LOSSES[step]})
        end()
    return work


def fail() -> None:
    raise RuntimeError("a rank was killed")


def interrupt() -> None:
    raise KeyboardInterrupt


def tensorboard_runs() -> list[dict[int, list[float]]]:
    """The losses of each run by step; a step that is there twice has two."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = []
    for folder in sorted(Path("outputs/demo/tensorboard").iterdir()):
        events = EventAccumulator(str(folder)).Reload().Scalars("loss")
        runs.append({one.step: [e.value for e in events if e.step == one.step] for one in events})
    return runs


def mlflow_runs(client: Any) -> list[tuple[Any, dict[int, list[float]]]]:
    runs = []
    for run in client.search_runs([one.experiment_id for one in client.search_experiments()]):
        history = client.get_metric_history(run.info.run_id, "loss")
        runs.append(
            (run, {one.step: [m.value for m in history if m.step == one.step] for one in history})
        )
    return runs


def once(last: int = 8) -> dict[int, list[float]]:
    return {step: [loss] for step, loss in LOSSES.items() if step <= last}


def test_tensorboard_has_every_step_and_the_settings(capfd: pytest.CaptureFixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    tracked("tensorboard", 0, 8, learning_rate=3e-4)
    assert tensorboard_runs() == [once()]
    (folder,) = Path("outputs/demo/tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) == {"epoch", "loss"}
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["LEARNING_RATE"].number_value == 3e-4
    assert "tracker: tensorboard: tensorboard --logdir outputs/demo/tensorboard" in (
        capfd.readouterr().out
    )


def test_mlflow_has_every_step_and_the_settings(mlflow: Any) -> None:
    tracked("mlflow", 0, 8, learning_rate=3e-4)
    ((run, losses),) = mlflow_runs(mlflow)
    assert losses == once()
    assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
    params = run.data.params
    assert (params["LEARNING_RATE"], params["BACKEND"]) == ("0.0003", "torch")
    assert params["DATASET"] == "data/demo/demo.jsonl" and "TRACKER" not in params


@pytest.mark.parametrize(("end", "status"), [(fail, "FAILED"), (interrupt, "KILLED")])
def test_mlflow_says_how_a_training_ended(mlflow: Any, end: Any, status: str) -> None:
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        tracked("mlflow", 0, 2, end)
    ((run, losses),) = mlflow_runs(mlflow)
    assert run.info.status == status and losses == once(2)


def test_a_resumed_training_continues_its_run_and_has_no_step_twice(mlflow: Any) -> None:
    for tracker in ("tensorboard", "mlflow"):
        with pytest.raises(RuntimeError):
            tracked(tracker, 0, 5, fail)
        state = Path("outputs/demo/work") / TRACKER_FILE
        # A kill right after steps 4 and 5 were logged, before that was written down.
        state.write_text(json.dumps({**json.loads(state.read_text()), "step": 3}))
        tracked(tracker, 3, 8)  # from the checkpoint of step 3
        shutil.rmtree("outputs/demo/work")
        Path("outputs/demo/work").mkdir()
    assert tensorboard_runs() == [once()]
    ((run, losses),) = mlflow_runs(mlflow)
    assert losses == once() and run.info.status == "FINISHED"


def test_a_killed_training_continues_its_run(tmp_path: Path) -> None:
    code = (
        "from tests.track import test_follow as t; import time; "
        "t.follow.POLL_SECONDS = 0.02; t.tracked('tensorboard', 0, 5, lambda: time.sleep(60))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    state = Path("outputs/demo/work") / TRACKER_FILE
    deadline = time.monotonic() + 60
    while not state.exists() or json.loads(state.read_text())["step"] < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    tracked("tensorboard", 2, 8)
    assert tensorboard_runs() == [once()]


def test_a_run_that_was_removed_from_the_tracker_starts_again(mlflow: Any) -> None:
    tracked("mlflow", 0, 3)
    mlflow.delete_run(mlflow_runs(mlflow)[0][0].info.run_id)
    tracked("mlflow", 3, 8)
    ((_, losses),) = mlflow_runs(mlflow)
    assert losses == once()


def test_another_tracker_gets_the_steps_from_the_first_on() -> None:
    work = tracked("none", 0, 4)
    assert not (work / TRACKER_FILE).exists()
    (work / TRACKER_FILE).write_text('{"tracker": "mlflow", "run": "abc", "step": 4}')
    tracked("tensorboard", 4, 8)
    assert tensorboard_runs() == [once()]


def test_a_training_that_is_refused_opens_no_run() -> None:
    def refuse() -> None:
        raise InputError("MAX_LENGTH is too long.")

    work = Path("outputs/demo/work")
    with pytest.raises(InputError), followed(Settings(tracker="tensorboard"), work, work.parent):
        refuse()
    assert not Path("outputs/demo/tensorboard").exists() and not list(work.iterdir())


def test_a_line_that_is_being_written_waits() -> None:
    work = Path("outputs/demo/work")
    line = json.dumps({"step": 1, "loss": LOSSES[1]}) + "\n"
    (work / "metrics.jsonl").write_text(line + '{"step": 2, "lo')
    with followed(Settings(tracker="tensorboard"), work, work.parent):
        pass
    assert tensorboard_runs() == [once(1)]


# A tracker that does not work.


def test_a_folder_that_cannot_be_written_is_said_and_the_training_goes_on(
    capfd: pytest.CaptureFixture,
) -> None:
    Path("outputs/demo/tensorboard").write_text("a file")
    tracked("tensorboard", 0, 8, lambda: time.sleep(0.5))
    printed = capfd.readouterr().out
    assert printed.count("failed, and the training goes on without it. NotADirectoryError") == 1
    assert "lacks the last 8 logged steps; metrics.jsonl has them" in printed


class Broken:
    """A tracker that keeps what it is told, and fails while `failures` is above 0."""

    def __init__(self, failures: int):
        self.failures, self.steps, self.ends = failures, [], []

    def open(self, name: str, run: Run) -> Broken:
        self.id, self.step, self.place = "abc", run.step, "nowhere"
        return self

    def log(self, lines: list[dict[str, Any]]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError(f"no route to {CANARIES['WANDB_API_KEY']}\nand more")
        self.steps += [line["step"] for line in lines]

    def close(self, status: str) -> None:
        self.ends.append(status)


def test_a_server_that_comes_back_gets_every_step(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARIES["WANDB_API_KEY"])
    tracker = Broken(failures=3)
    monkeypatch.setattr(follow, "open_run", tracker.open)
    tracked("wandb", 0, 8, lambda: time.sleep(0.5))
    assert tracker.steps == list(LOSSES) and tracker.ends[-1] == "finished"
    printed = capfd.readouterr().out
    assert printed.count("goes on without it. ConnectionError: no route to ***. metrics") == 1
    assert "works again, and has every step" in printed


def test_a_server_that_hangs_delays_the_end_only_so_long(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    hanging = Event()
    monkeypatch.setattr(follow, "open_run", lambda *_: hanging.wait(30))
    monkeypatch.setattr(follow, "LAST_SECONDS", 0.2)
    started = time.monotonic()
    tracked("mlflow", 0, 8)
    assert time.monotonic() - started < 5
    assert "lacks the last 8 logged steps after 0.2 s" in capfd.readouterr().out
    hanging.set()


def test_no_tracker_keeps_or_prints_a_secret(
    monkeypatch: pytest.MonkeyPatch, mlflow: Any, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    for name, canary in CANARIES.items():
        monkeypatch.setenv(name, canary)
    tracked("tensorboard", 0, 4)
    tracked("mlflow", 4, 8)
    password = CANARIES["MLFLOW_TRACKING_PASSWORD"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{password}@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "outputs/demo/work" / TRACKER_FILE).unlink()
    tracked("mlflow", 4, 8, lambda: time.sleep(0.5))
    found, read = holding(tmp_path)
    printed = capfd.readouterr()
    assert not found and read > 4
    assert "tracker: mlflow: failed" in printed.out
    assert not held((printed.out + printed.err).encode())


# Trackers that the tests' requirements leave out: `pip install wandb trackio` runs these.


def test_wandb_offline_keeps_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(RuntimeError):
        tracked("wandb", 0, 5, fail)
    tracked("wandb", 3, 8)
    first, last = sorted(Path("outputs/demo/wandb").glob("offline-run-*/*.wandb"))
    assert first.name == last.name  # the same run's id
    content = last.read_bytes()
    assert all(str(loss).encode() in content for loss in LOSSES.values())
    assert b"LEARNING_RATE" in content


def test_trackio_has_every_step_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    import sqlite3

    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    with pytest.raises(RuntimeError):
        tracked("trackio", 0, 5, fail)
    tracked("trackio", 3, 8)
    (path,) = tmp_path.glob("**/trn-tune.db")
    rows = sqlite3.connect(path).execute("select run_name, step from metrics").fetchall()
    assert sorted(step for _, step in rows) == list(LOSSES) and len({run for run, _ in rows}) == 1
