"""One adapter per tracker's library, all with the same three methods.

Each is imported when a run is opened, by a thread of its own (follow.py): a library may take
seconds to import, and minutes to give up on a server.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stages.track.check import mlflow_uri

PROJECT = "trn-tune"  # of runs, where the library's own variable names no other


@dataclass(frozen=True)
class Run:
    """What is opened: RUN's name, its folder in outputs/, and the settings to record.

    `id` is the run to continue, "" for a new one; `step` is the last step that it has.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    id: str = ""
    step: int = 0


class Tracker(Protocol):
    """An open run. `id` continues it later; `place` says where it is; `step` is its last step."""

    id: str
    place: str
    step: int

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Log lines of metrics.jsonl; returns when the library has taken them."""

    def close(self, status: str) -> None:
        """End the run: `finished`, `failed` or `killed`."""


def open_run(tracker: str, run: Run) -> Tracker:
    """Open or continue `run` with the library that TRACKER names. Raises whatever that raises."""
    return _LIBRARIES[tracker](run)


def _values(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step"}


class TensorBoard:
    """Event files in outputs/RUN/tensorboard, a folder per run."""

    def __init__(self, run: Run):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        root = run.folder / "tensorboard"
        continued = bool(run.id) and (root / run.id).is_dir()
        new = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        self.id = run.id if continued else new
        self.step = run.step if continued else 0
        self.place = f"tensorboard --logdir {root}"
        (root / self.id).mkdir(parents=True, exist_ok=True)
        # TensorBoard orders the files of a folder by the time in their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (root / self.id / name).open("wb")
        # Not tensorboard's own writer: its thread takes a full disk to itself.
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2", step=self.step + 1)
        if continued:  # what an earlier file has from this step on is dropped
            self._write(step=self.step + 1, session_log=SessionLog(status=SessionLog.START))
        else:
            self._write(summary=hparams_pb(run.settings, trial_id=self.id))
        self._flush()

    def log(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            values = [
                self._summary.Value(tag=name, simple_value=value)
                for name, value in _values(line).items()
            ]
            self._write(step=line["step"], summary=self._summary(value=values))
        self._flush()

    def close(self, status: str) -> None:
        self._file.close()  # an event file has no status

    def _write(self, **parts: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **parts).SerializeToString())

    def _flush(self) -> None:
        self._file.flush()


class MLflow:
    """A run on MLFLOW_TRACKING_URI, or in a database in outputs/ that all runs share."""

    def __init__(self, run: Run):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        for name in ("alembic", "mlflow"):  # they report every table of a new database
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = mlflow_uri()
        self._metric, self._client = Metric, MlflowClient(tracking_uri=uri)
        self.id, self.step = run.id, run.step
        if run.id and self._exists(run.id):
            self._client.update_run(run.id, status="RUNNING")
            # MLflow keeps a step twice that is logged twice, and a kill may have come after it was.
            history = self._client.get_metric_history(run.id, "loss")
            self.step = max((metric.step for metric in history), default=0)
        else:
            created = self._client.create_run(self._experiment(), run_name=run.name)
            self.id, self.step = created.info.run_id, 0
            params = [Param(name, str(value)[:500]) for name, value in run.settings.items()]
            self._client.log_batch(self.id, params=params)
        show = "" if uri.startswith("http") else f"; uvx mlflow ui --backend-store-uri {uri}"
        self.place = f"run {self.id} at {uri}{show}"

    def log(self, lines: list[dict[str, Any]]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(name, value, now, line["step"])
            for line in lines
            for name, value in _values(line).items()
        ]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self, status: str) -> None:
        self._client.set_terminated(self.id, status.upper())

    def _exists(self, run: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _experiment(self) -> str:
        if named := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return named
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        known = self._client.get_experiment_by_name(name)
        return known.experiment_id if known else self._client.create_experiment(name)


class Wandb:
    """A run of W&B; WANDB_MODE=offline keeps it in outputs/RUN/wandb, where the last is whole."""

    def __init__(self, run: Run):
        # Seconds to reach its server, and to upload the last points: else as long as it likes.
        for name in ("WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"):
            os.environ.setdefault(name, "50")
        import wandb

        self.id = run.id or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            dir=os.environ.get("WANDB_DIR") or str(run.folder),
            id=self.id,
            name=run.name,
            config=run.settings,
            resume="allow",
            # The stage's own output stays what it is, and is not uploaded; nor is its code.
            settings=wandb.Settings(console="off", save_code=False),
        )
        mode = self._run.settings.mode
        # W&B says what its server has. Off-line a kill loses what was not on the disk yet, so each
        # start writes the run from its first step, in a folder of its own.
        self.step = 0 if mode == "offline" else max(0, self._run.step - 1)
        if mode == "disabled":
            self.place = "WANDB_MODE=disabled: nothing is logged"
        elif mode == "offline":
            self.place = f"offline; upload: wandb sync {Path(self._run.dir).parent}"
        else:
            self.place = self._run.url

    def log(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self._run.log(_values(line), step=line["step"])

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class Trackio:
    """A run of Trackio: on TRACKIO_SPACE_ID, or in Hugging Face's cache (TRACKIO_DIR)."""

    def __init__(self, run: Run):
        import trackio

        # It finds a run by its name, so the name has to be one run's.
        self.id = run.id or f"{run.name}-{secrets.token_hex(3)}"
        self.step = run.step
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        self._run = trackio.init(
            project=project, name=self.id, resume="allow", config=run.settings, embed=False
        )
        self.place = (
            os.environ.get("TRACKIO_SPACE_ID")
            or os.environ.get("TRACKIO_SERVER_URL")
            or f"trackio show --project {project}"
        )

    def log(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self._run.log(_values(line), step=line["step"])

    def close(self, status: str) -> None:
        self._run.finish()


_LIBRARIES: dict[str, Callable[[Run], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": Wandb,
    "trackio": Trackio,
}
