"""Times come from this machine's manifests, else from what others measured, else are unknown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from stages.forecast.accuracy import accuracy
from stages.forecast.machine import place_of
from stages.forecast.minutes import UTILISATIONS, fixed_seconds, stage_seconds, training_seconds
from stages.forecast.planned import compared
from stages.run.cost import dollars
from stages.run.machines import MACHINES
from stages.run.manifest import with_checksum
from stages.run.settings import Settings
from tests.forecast.test_memory import model
from tests.run.test_recipes import KEYS, MODELS

HERE = place_of(Settings(device="cpu", backend="torch"))


def ran(outputs: Path, run: str, stage: str, seconds: float, /, **more: Any) -> None:
    """A stage that another run here published, with SmolLM2 135M."""
    folder = outputs / run / stage
    folder.mkdir(parents=True)
    settings = {"MAX_LENGTH": 512, "LORA_R": 0, "BF16": True, "NPROC_PER_NODE": 1}
    settings["PER_DEVICE_TRAIN_BATCH_SIZE"] = Settings().per_device_train_batch_size
    manifest = {
        "provenance": {"settings": settings, "versions": {}, "code": {}, "inputs": {}},
        "seen": {"code": {}, "files": {}, "backend": "torch"},
        "outputs": {},
        "content": "",
        "device": "cpu, 2 cores",
        "seconds": seconds,
        "finished": "2026-11-28T00:00:00Z",
        **more,
    }
    (folder / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    config = dict(zip(KEYS, MODELS["smollm2-135m"][0], strict=True))
    (folder / "config.json").write_text(json.dumps(config))


def test_a_training_is_as_fast_as_the_last_one_and_takes_as_long_to_start(tmp_path: Path) -> None:
    ran(tmp_path, "one", "train", 110, tokens=20_000, metrics={"tokens_per_second": 200})
    shape, run = model("smollm2-135m"), Settings(max_length=512)
    same = training_seconds(shape, run, 20_000, HERE, tmp_path)
    assert same.seconds == pytest.approx(110) and "in run one" in same.basis
    longer = training_seconds(shape, run, 40_000, HERE, tmp_path)
    assert longer.seconds == pytest.approx(210)
    larger = model("qwen3-0.6b")
    ratio = larger.flop_per_token(512) / shape.flop_per_token(512)
    scaled = training_seconds(larger, run, 20_000, HERE, tmp_path)
    steps = 20_000 / (512 * run.per_device_train_batch_size)
    fixed, of_larger = (steps * fixed_seconds(one, run, HERE) for one in (shape, larger))
    assert scaled.seconds == pytest.approx(10 + (100 - fixed) * ratio + of_larger)


def test_a_step_of_twice_the_tokens_takes_less_than_twice_as_long_on_a_cpu(tmp_path: Path) -> None:
    """The optimizer's time, and that of starting operations, do not grow with the tokens."""
    ran(tmp_path, "one", "train", 110, tokens=20_000, metrics={"tokens_per_second": 200})
    shape, run = model("smollm2-135m"), Settings(max_length=512)
    twice = replace(run, per_device_train_batch_size=2 * run.per_device_train_batch_size)
    found = training_seconds(shape, twice, 20_000, HERE, tmp_path).seconds
    assert found is not None
    steps = 20_000 / (512 * run.per_device_train_batch_size)
    assert found == pytest.approx(110 - steps / 2 * fixed_seconds(shape, run, HERE))


def test_what_has_never_run_here_is_unknown(tmp_path: Path) -> None:
    shape = model("smollm2-135m")
    assert training_seconds(shape, Settings(), 1000, HERE, tmp_path).seconds is None
    assert training_seconds(shape, Settings(), None, HERE, tmp_path).seconds is None
    assert stage_seconds("data", "demo", shape, HERE, tmp_path).seconds is None


def test_a_stage_takes_as_long_as_in_this_run_else_as_the_models_size_says(tmp_path: Path) -> None:
    ran(tmp_path, "one", "consolidate", 10)
    own = stage_seconds("consolidate", "one", model("smollm2-135m"), HERE, tmp_path)
    assert own.seconds == 10
    other = stage_seconds("consolidate", "two", model("qwen3-0.6b"), HERE, tmp_path)
    assert other.seconds == pytest.approx(10 * (2.8e9 + 596_049_920) / (2.8e9 + 134_515_008))


def test_compiling_takes_as_long_as_the_layers_say_not_as_kept_packages_did(tmp_path: Path) -> None:
    for run, seconds, kept in (("one", 52, False), ("two", 9, True)):
        ran(tmp_path, run, "consolidate", 8)
        ran(tmp_path, run, "compile-inference", seconds, metrics={"packages_kept": kept})
    deeper = stage_seconds("compile-inference", "new", model("llama2-7b"), HERE, tmp_path)
    assert deeper.seconds == pytest.approx(22 + 32) and "run one" in deeper.basis


def test_what_another_device_compiled_says_nothing_of_another_size(tmp_path: Path) -> None:
    ran(tmp_path, "one", "consolidate", 8)
    ran(tmp_path, "one", "compile-inference", 100, device="NVIDIA H100")
    gpu = replace(HERE, device="cuda")
    assert (
        stage_seconds("compile-inference", "b", model("llama2-7b"), gpu, tmp_path).seconds is None
    )
    same = stage_seconds("compile-inference", "b", model("smollm2-135m"), gpu, tmp_path)
    assert same.seconds == 100


@pytest.mark.parametrize("name", MACHINES)
def test_another_machine_has_the_speed_that_was_measured_there_or_none(
    name: str, tmp_path: Path
) -> None:
    run = Settings(instance=name, nproc_per_node=MACHINES[name].cores)
    time = training_seconds(model("llama2-7b"), run, 10**6, place_of(run), tmp_path)
    assert (time.seconds is not None) == (MACHINES[name].device in UTILISATIONS)
    assert "measured elsewhere" in time.basis or "no utilisation" in time.basis


def test_the_tutorials_training_takes_what_the_tutorial_took(tmp_path: Path) -> None:
    """72 steps of 64 x 2,048 tokens in 31:46; the utilisation is rounded to 7.1%."""
    run = Settings(instance="trn1.32xlarge", nproc_per_node=32, tensor_parallel_size=8)
    tokens = 72 * 64 * 2048
    time = training_seconds(model("llama2-7b"), run, tokens, place_of(run), tmp_path)
    assert time.seconds == pytest.approx(31 * 60 + 46, rel=0.05)


@given(st.floats(0, 10**6), st.floats(0.01, 100))
@hypothesis_settings(max_examples=50)
def test_dollars_are_price_times_time(seconds: float, price: float) -> None:
    assert dollars(seconds, price) == pytest.approx(seconds * price / 3600, abs=1e-4)


def test_past_forecasts_are_told_with_their_errors(tmp_path: Path) -> None:
    assert next(accuracy(tmp_path, HERE)) == "no memory forecasts on this machine yet"
    for run, planned, measured in (("a", 98, 100), ("b", 106, 100), ("c", None, 100)):
        forecast = compared({"peak_memory_bytes": planned}, {"peak_memory_bytes": measured})
        ran(tmp_path, run, "train", 1, forecast=forecast)
    memory, time = accuracy(tmp_path, HERE)
    assert memory == (
        "2 memory forecasts on this machine: mean 4.0%, worst 6.0%, no wrong fit among those that "
        "ended"
    )
    assert time == "no time forecasts on this machine yet"
    ran(tmp_path, "d", "train", 1, forecast=compared(*({"peak_memory_bytes": n} for n in (80, 99))))
    swapped = next(accuracy(tmp_path, replace(HERE, device_memory=98)))
    assert swapped.endswith("worst 19.2%, 1 wrong fit among those that ended")
    not_fit = next(accuracy(tmp_path, replace(HERE, device_memory=100)))
    assert "no wrong fit" in not_fit, "106 were planned, and it ended"


def test_the_utilisation_of_a_7b_says_nothing_of_a_small_model(tmp_path: Path) -> None:
    run = Settings(instance="p5.48xlarge", nproc_per_node=8)
    small = training_seconds(model("smollm2-135m"), run, 10**6, place_of(run), tmp_path)
    assert small.seconds is None and "by a model of 134,515,008" in small.basis
    assert training_seconds(model("llama2-7b"), run, 10**6, place_of(run), tmp_path).seconds


def test_instance_price_is_of_the_machine_that_is_planned_for_and_of_no_other() -> None:
    run = Settings(instance="trn1.2xlarge", instance_price=9.0, compare="trn1.32xlarge")
    assert (place_of(run).price, place_of(run).price_basis) == (9.0, "INSTANCE_PRICE")
    assert place_of(run, "trn1.32xlarge").price == MACHINES["trn1.32xlarge"].price
