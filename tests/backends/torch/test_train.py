"""Training on the torch backend: the same losses on any layout, the same weights after any
interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from stages.backends.batches import PackedSequences, sequences_of_step
from stages.backends.loss import loss_sum, next_token_labels, supervised
from stages.backends.schedule import derivation, sequences_per_step, total_steps
from stages.backends.torch import optimizer
from stages.backends.torch.train import environment, train, training_command
from stages.model.base import base_model_folder
from stages.run.errors import StageFailure
from stages.run.fingerprint import ROOT
from stages.run.settings import Settings
from tests.conftest import clean_environment, torchrun
from tests.saved_weights import with_a_value_that_is_no_number
from tests.small_training import STEPS, shards


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def trained(settings: Settings, data: Path, work: Path) -> list[dict]:
    """Train in `work`; the lines of metrics.jsonl."""
    work.mkdir(exist_ok=True)
    train(settings, data, work.parent / "precompile", work)
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(base: Settings, data: Path) -> dict[int, list[float]]:
    """Losses of a plain loop over the plain Hugging Face model in this process, by rows per
    step."""
    from transformers import AutoModelForCausalLM

    losses = {}
    rows = PackedSequences(data / "train")
    for count in (1, 2, 8):
        model = AutoModelForCausalLM.from_pretrained(base_model_folder(base), dtype=torch.float32)
        adamw = optimizer.adamw(model, base)
        losses[count] = []
        for step in range(STEPS):
            batch = rows.batch(
                sequences_of_step(step, count, len(rows), base.seed), torch.device("cpu")
            )
            loss = loss_sum(model, batch) / int(
                supervised(batch["labels"], batch["position_ids"]).sum()
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), base.max_grad_norm)
            for group in adamw.param_groups:
                group["lr"] = optimizer.learning_rate(step, STEPS, base)
            adamw.step()
            adamw.zero_grad()
            losses[count].append(loss.item())
    return losses


LAYOUTS = {
    "one process": {},
    "eight accumulated micro-batches": {"gradient_accumulation_steps": 8},
    "a micro-batch of eight": {"per_device_train_batch_size": 8},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_losses_are_those_of_a_plain_loop_however_a_step_is_cut(
    layout, base, data, reference, tmp_path
) -> None:
    settings = replace(base, **layout)
    losses = [line["loss"] for line in trained(settings, data, tmp_path / "work")]
    assert losses == pytest.approx(reference[sequences_per_step(settings)], abs=2e-5)


def test_a_killed_training_resumes_and_ends_with_the_same_shards(
    base: Settings, data: Path, tmp_path: Path
) -> None:
    settings = replace(base, nproc_per_node=2, save_steps=2, max_steps=8)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    expected = trained(settings, data, undisturbed)

    killed.mkdir()
    command = training_command(settings, base_model_folder(settings), data, killed, max_steps=-1)
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment(settings)},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    while not (killed / "checkpoints" / "step-00000004").exists():
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    resumed = trained(settings, data, killed)
    assert [line["step"] for line in resumed] == list(range(1, 9))
    assert [line["loss"] for line in resumed] == [line["loss"] for line in expected]
    # To the byte, headers included: else consolidate would run again for nothing.
    assert shards(killed) == shards(undisturbed)


def test_a_loss_that_is_no_number_stops_the_training_and_names_the_step(
    base: Settings, data: Path, tmp_path: Path
) -> None:
    broken = with_a_value_that_is_no_number(base_model_folder(base), tmp_path / "broken")
    with pytest.raises(StageFailure, match=r"Step 1: the loss .* not finite"):
        trained(
            replace(base, model_id=str(broken), init_weights="pretrained"), data, tmp_path / "work"
        )
    assert not (tmp_path / "work" / "shards").exists()


def test_every_parameter_has_a_gradient_on_every_rank_when_layers_are_compiled(
    base: Settings, data: Path, tmp_path: Path
) -> None:
    settings = replace(base, nproc_per_node=2, tensor_parallel_size=2, torch_compile=True)
    done = subprocess.run(
        [
            *torchrun(2, "tests.backends.torch.gradients"),
            str(base_model_folder(settings)),
            str(data),
            str(tmp_path / "error"),
        ],
        env={**clean_environment(), **environment(settings), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "without gradient: []" in done.stdout
    assert not list(tmp_path.glob("torchelastic_*")), "the launcher left a folder behind"


def test_no_document_predicts_the_first_token_of_the_next() -> None:
    labels, positions = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[0, 1, 2, 0, 1]])
    assert next_token_labels(labels, positions).tolist() == [[2, 3, -100, 5, -100]]
    assert supervised(labels, positions).tolist() == [3]


@pytest.mark.parametrize(("rows", "count"), [(7, 3), (3, 7), (5, 5), (1, 2)])
def test_every_row_is_read_once_an_epoch_in_an_order_that_the_seed_decides(
    rows: int, count: int
) -> None:
    read = np.concatenate(
        [sequences_of_step(step, count, rows, seed=1) for step in range(2 * rows)]
    )
    epochs = read[: len(read) // rows * rows].reshape(-1, rows)
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs.tolist())
    again = np.concatenate(
        [sequences_of_step(step, count, rows, seed=1) for step in range(2 * rows)]
    )
    assert np.array_equal(read, again)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 4, 30])
def test_the_learning_rate_is_that_of_transformers_at_every_step(shape: str, warmup: int) -> None:
    settings = Settings(learning_rate=1.0, warmup_steps=warmup, lr_scheduler_type=shape)
    rates = [optimizer.learning_rate(step, 20, settings) for step in range(20)]
    name = "constant_with_warmup" if shape == "constant" else shape
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, adamw, warmup, 20)
    for rate in rates:
        assert rate == pytest.approx(adamw.param_groups[0]["lr"])
        adamw.step()
        schedule.step()
    assert (rates[0] == 0) == (warmup > 0)


def test_a_warm_up_says_that_its_first_step_changes_nothing() -> None:
    def said(warmup: int) -> str:
        settings = Settings(learning_rate=1e-3, warmup_steps=warmup, max_steps=8)
        return "\n".join(line for line in derivation(settings, 9) if line.startswith("warm-up"))

    assert said(0) == ""
    assert "changes no weight; step 4 has LEARNING_RATE=0.001" in said(3)
    assert "changes no weight, and LEARNING_RATE=0.001 is never reached" in said(8)


def test_steps_cover_every_row_as_often_as_there_are_epochs() -> None:
    settings = Settings(
        num_train_epochs=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=16,
        nproc_per_node=32,
        tensor_parallel_size=8,
    )
    assert sequences_per_step(settings) == 64
    assert total_steps(settings, 1581) == 75
