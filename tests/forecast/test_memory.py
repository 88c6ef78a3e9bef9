"""Laws of the memory of a training, and the points that are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from stages.forecast.fits import in_all, need_of, smallest_change, verdict
from stages.forecast.machine import place_of
from stages.forecast.memory import CPU_PROCESS, neuron_memory, training_memory
from stages.forecast.parameters import Shape, shape_of
from stages.model.fit import raw_config
from stages.run.settings import Settings
from tests.run.test_recipes import KEYS, MODELS, bytes_per_process


def model(recipe: str) -> Shape:
    shape = shape_of(raw_config(dict(zip(KEYS, MODELS[recipe][0], strict=True))))
    assert shape is not None
    return shape


LAYOUTS = st.builds(
    lambda batch, length, tensor, data, lora, checkpointing, bf16: Settings(
        per_device_train_batch_size=batch,
        max_length=64 * length,
        tensor_parallel_size=tensor,
        nproc_per_node=tensor * data,
        lora_r=lora,
        gradient_checkpointing=checkpointing,
        bf16=bf16,
    ),
    *(st.integers(1, 16), st.integers(1, 64), st.sampled_from([1, 2, 4]), st.integers(1, 8)),
    *(st.sampled_from([0, 16]), st.booleans(), st.booleans()),
)


def peak(settings: Settings, device: str = "cuda", recipe: str = "llama3.1-8b") -> int:
    return training_memory(model(recipe), settings, device).bytes


@given(LAYOUTS)
@hypothesis_settings(max_examples=60)
def test_memory_grows_with_length_and_batch_and_shrinks_with_ranks(run: Settings) -> None:
    here = peak(run)
    assert peak(replace(run, max_length=2 * run.max_length)) >= here
    assert peak(replace(run, per_device_train_batch_size=2 * run.per_device_train_batch_size)) >= (
        here
    )
    assert peak(replace(run, nproc_per_node=2 * run.nproc_per_node)) <= here
    both = {"tensor_parallel_size": 2 * run.tensor_parallel_size}
    assert peak(replace(run, **both, nproc_per_node=2 * run.nproc_per_node)) < here
    assert peak(replace(run, gradient_checkpointing=True)) <= here


@given(LAYOUTS)
@hypothesis_settings(max_examples=60)
def test_tensor_parallelism_halves_states_and_logits(run: Settings) -> None:
    halved = replace(
        run,
        tensor_parallel_size=2 * run.tensor_parallel_size,
        nproc_per_node=2 * run.nproc_per_node,
    )
    one, two = (
        {part.name: part.bytes for part in training_memory(model("llama2-7b"), each, "cpu").parts}
        for each in (run, halved)
    )
    for name in one.keys() & two.keys() & {"master weights", "optimizer", "logits"}:
        assert two[name] == pytest.approx(one[name] / 2, rel=0.01)


def test_llama_2_7b_has_the_states_that_mixed_precision_is_known_for() -> None:
    """18 bytes a parameter: float32 weights, gradients, two moments, and bfloat16 copies."""
    need = training_memory(
        model("llama2-7b"), Settings(gradient_checkpointing=True, max_length=256), "cuda"
    )
    states = sum(
        part.bytes
        for part in need.parts
        if part.name in ("master weights", "weights", "optimizer", "gradients")
    )
    assert states == pytest.approx(18 * 6_738_415_616, rel=1e-3)
    assert need.moment == "when the backward pass ends"


def test_a_process_on_a_cpu_counts_itself_and_one_on_neuron_does_not() -> None:
    run = Settings(max_length=256)
    on_cpu, on_neuron = peak(run, "cpu"), peak(run, "neuron")
    assert on_cpu - on_neuron == CPU_PROCESS


@pytest.mark.parametrize("recipe", ["llama2-7b", "qwen3-8b"])
def test_optimum_neuron_keeps_what_the_recipes_count(recipe: str) -> None:
    run = Settings(backend="neuron", nproc_per_node=32, tensor_parallel_size=8)
    need = neuron_memory(model(recipe), run)
    states = sum(
        part.bytes for part in need.parts if part.name in ("weights", "gradients", "optimizer")
    )
    assert states == pytest.approx(bytes_per_process(run, model(recipe).parameters), rel=1e-6)


def test_what_does_not_fit_gets_the_smallest_change_that_fits() -> None:
    run = Settings(device="cuda", per_device_train_batch_size=32, max_length=2048)
    place = place_of(replace(run, instance="p5.48xlarge"))
    shape = model("qwen3-0.6b")
    assert in_all(need_of(shape, run, place).bytes, run, place) > (place.device_memory or 0)
    change = smallest_change(shape, run, place)
    assert change == (
        "GRADIENT_CHECKPOINTING=1 PER_DEVICE_TRAIN_BATCH_SIZE=8 GRADIENT_ACCUMULATION_STEPS=4"
    )
    halves = replace(run, gradient_checkpointing=True, per_device_train_batch_size=16)
    for changed, said in (
        (replace(halves, gradient_accumulation_steps=2), "MAY NOT FIT "),  # so it is not named
        (
            replace(halves, per_device_train_batch_size=8, gradient_accumulation_steps=4),
            "fits ",
        ),
    ):
        total = in_all(need_of(shape, changed, place).bytes, changed, place)
        assert verdict(changed, shape, place, total).startswith(said)


def test_no_change_is_named_that_the_backend_refuses() -> None:
    """Four processes cannot share 2 KV heads, nor Trainium connect 4."""
    sizes: dict[str, Any] = dict(zip(KEYS, MODELS["llama3.1-8b"][0], strict=True))
    for instance, key_value_heads, named in (
        ("g5.48xlarge", 8, "TENSOR_PARALLEL_SIZE=4 NPROC_PER_NODE=4"),
        ("g5.48xlarge", 2, "LORA_R=16"),
        ("trn1.32xlarge", 8, "TENSOR_PARALLEL_SIZE=8 NPROC_PER_NODE=8"),
    ):
        run = Settings(instance=instance, gradient_checkpointing=True)
        changed = {"num_key_value_heads": key_value_heads, "num_hidden_layers": 4}
        shape = shape_of(raw_config({**sizes, **changed}))
        assert shape is not None
        assert smallest_change(shape, run, place_of(run)) == named


def test_no_change_is_named_that_the_settings_refuse() -> None:
    """1,026 tokens cannot be divided among 4 processes, though 1,024 can."""
    sizes: dict[str, Any] = dict(zip(KEYS, MODELS["llama3.1-8b"][0], strict=True))
    shape = shape_of(raw_config({**sizes, "num_hidden_layers": 4}))
    assert shape is not None
    for length, named in ((1024, "TENSOR_PARALLEL_SIZE=4 NPROC_PER_NODE=4"), (1026, "LORA_R=16")):
        run = Settings(instance="g5.48xlarge", gradient_checkpointing=True, max_length=length)
        assert smallest_change(shape, run, place_of(run)) == named


def test_where_nothing_makes_it_fit_no_change_is_named() -> None:
    place = place_of(Settings(instance="g5.xlarge"))
    huge: dict[str, Any] = dict(zip(KEYS, MODELS["llama3.1-8b"][0], strict=True))
    shape = shape_of(raw_config({**huge, "num_hidden_layers": 320}))
    assert shape is not None
    assert smallest_change(shape, Settings(instance="g5.xlarge"), place) == ""
    said = verdict(Settings(instance="g5.xlarge"), shape, place, 10**12)
    assert "No change that was tried makes it fit: " in said


def test_the_gradients_of_the_micro_batches_before_are_there_when_the_next_begins() -> None:
    one = Settings(per_device_train_batch_size=2, max_length=512, bf16=True)
    shape = model("smollm2-135m")
    difference = peak(replace(one, gradient_accumulation_steps=2), "cpu", "smollm2-135m") - peak(
        one, "cpu", "smollm2-135m"
    )
    assert difference == 4 * shape.parameters
