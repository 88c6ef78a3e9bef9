"""The train stage with a tracker: what is logged, what is published, and what make does with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.conftest import Project


def losses(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(e.step, e.value) for e in EventAccumulator(str(folder)).Reload().Scalars("loss")]


def test_a_tracked_training_publishes_the_same_model(built: Project) -> None:
    before = built.manifest("train")["content"]
    shutil.rmtree(built.folder / "outputs" / "tiny" / "train")
    done = built.make("train", "RECIPE=tiny", "TRACKER=tensorboard")
    assert "tracker: tensorboard: tensorboard --logdir outputs/tiny/tensorboard" in done.stdout

    run_folder = built.folder / "outputs" / "tiny"
    (folder,) = (run_folder / "tensorboard").iterdir()
    lines = (run_folder / "train" / "metrics.jsonl").read_text().splitlines()
    written = [(line["step"], line["loss"]) for line in map(json.loads, lines)]
    assert [step for step, _ in losses(folder)] == [step for step, _ in written] == [1, 2]
    assert all(abs(a - b) < 1e-6 for (_, a), (_, b) in zip(losses(folder), written, strict=True))

    state = json.loads((run_folder / "train" / "tracker.json").read_text())
    assert state == {"tracker": "tensorboard", "run": folder.name, "step": 2}
    assert built.manifest("train")["content"] == before
    assert built.stages_to_run("all", "RECIPE=tiny") == []
    built.make("verify", "RECIPE=tiny")
    built.make("clean", "RECIPE=tiny", "YES=1")
    assert not run_folder.exists()
