"""What NeuronTrainer's callback logs reaches the tracker."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.backends.neuron.metrics_callback import MetricsCallback
from stages.run.settings import Settings
from stages.track import follow


def test_every_logged_step_is_in_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(follow, "POLL_SECONDS", 0.02)
    work = tmp_path / "run" / "work"
    work.mkdir(parents=True)
    callback = MetricsCallback(work, 0, sequences=8, sequences_per_step=2, length=64)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=3, global_step=0)
    control = SimpleNamespace(should_log=False, should_save=False)
    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-3}])
    with follow.followed(Settings(tracker="tensorboard", backend="neuron"), work, work.parent):
        callback.on_train_begin(None, state, control)
        for state.global_step in (1, 2, 3):
            callback.on_pre_optimizer_step(None, state, control, optimizer=optimizer)
            callback.on_step_end(None, state, control)
            callback.on_log(None, state, control, {"loss": 0.5**state.global_step, "grad_norm": 1})
        callback.on_train_end(None, state, control)
    (folder,) = (tmp_path / "run" / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert "tokens_per_second" in events.Tags()["scalars"]
