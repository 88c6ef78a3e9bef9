"""Which numbers of processes a model can be trained with on which machine, and that what is
proposed instead works."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import GPT2Config, GraniteConfig, LlamaConfig, Qwen3Config

from stages.backends.neuron.check import machine_problems
from stages.backends.neuron.hardware import Hardware, neuron_cores
from stages.backends.neuron.parallel_sizes import (
    Sizes,
    nearest,
    size_problems,
    topology_problems,
)
from stages.run.errors import InputError
from stages.run.machines import NEURON_MACHINES
from stages.run.settings import Settings
from tests.fakes.neuron_machine import FakeMachine

MODELS: dict[str, Any] = {
    "llama 2 7B": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "llama 3 8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "llama 3.2 3B": LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
    ),
    "qwen3 8B": Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "granite 2B": GraniteConfig(
        vocab_size=49155,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "with 3 kv heads": LlamaConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=24, num_key_value_heads=3
    ),
    "with 50257 words": LlamaConfig(vocab_size=50257),
    "with biases": LlamaConfig(attention_bias=True),
    "sliding": Qwen3Config(
        use_sliding_window=True, max_window_layers=0, sliding_window=1024, num_key_value_heads=32
    ),
    "of uneven heads": LlamaConfig(hidden_size=1000, num_attention_heads=16, head_dim=64),
    "gpt2": GPT2Config(),
}

WORKS = [
    ("trn1.32xlarge", "llama 2 7B", {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 8}),
    (
        "trn1.32xlarge",
        "llama 2 7B",
        {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 8, "PIPELINE_PARALLEL_SIZE": 4},
    ),
    ("trn1.32xlarge", "llama 3 8B", {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 8}),
    (
        "trn1.32xlarge",
        "llama 3 8B",
        {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 32},
    ),  # each KV head in four processes
    ("trn1.32xlarge", "llama 3 8B", {"NPROC_PER_NODE": 8, "TENSOR_PARALLEL_SIZE": 8}),
    (
        "trn1.32xlarge",
        "llama 3.2 3B",
        {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 2, "PIPELINE_PARALLEL_SIZE": 16},
    ),  # 28 layers
    ("trn1.32xlarge", "qwen3 8B", {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 8}),
    (
        "trn1.32xlarge",
        "granite 2B",
        {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 8},
    ),  # its 49155 embeddings are not divided
    ("trn1.2xlarge", "llama 3.2 3B", {"NPROC_PER_NODE": 2, "TENSOR_PARALLEL_SIZE": 2}),
    ("trn1.2xlarge", "llama 3.2 3B", {"NPROC_PER_NODE": 1}),
    ("trn2.3xlarge", "llama 3 8B", {"NPROC_PER_NODE": 4, "TENSOR_PARALLEL_SIZE": 4}),
    ("trn2.48xlarge", "llama 3 8B", {"NPROC_PER_NODE": 64, "TENSOR_PARALLEL_SIZE": 4}),
    (
        "trn1.32xlarge",
        "llama 3 8B",
        {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 8, "LORA_R": 16},
    ),
]
REFUSED = [
    (
        "trn1.2xlarge",
        "llama 2 7B",
        {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 8},
        "above the 2 cores here",
        1,
    ),
    (
        "trn1.32xlarge",
        "llama 2 7B",
        {"NPROC_PER_NODE": 64, "TENSOR_PARALLEL_SIZE": 8},
        "above the 32 cores here",
        1,
    ),
    (
        "trn1.32xlarge",
        "llama 2 7B",
        {"NPROC_PER_NODE": 16, "TENSOR_PARALLEL_SIZE": 8},
        "1, 2, 8 and multiples of 32",
        1,
    ),
    ("trn1.32xlarge", "llama 2 7B", {"NPROC_PER_NODE": 4}, "that Trainium does not connect", 1),
    ("inf2.24xlarge", "llama 2 7B", {"NPROC_PER_NODE": 12}, "that Trainium does not connect", 1),
    (
        "trn1.32xlarge",
        "llama 3.2 3B",
        {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 16},
        "does not divide the model's 24 attention",
        1,
    ),
    (
        "trn1.32xlarge",
        "llama 3.2 3B",
        {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 32},
        "24 attention heads",
        1,
    ),
    (
        "trn1.32xlarge",
        "with 50257 words",
        {"NPROC_PER_NODE": 8, "TENSOR_PARALLEL_SIZE": 8},
        "50257 vocabulary entries",
        1,
    ),
    (
        "trn1.32xlarge",
        "with 3 kv heads",
        {"NPROC_PER_NODE": 8, "TENSOR_PARALLEL_SIZE": 8},
        "neither a divisor nor a multiple",
        1,
    ),
    (
        "trn1.32xlarge",
        "granite 2B",
        {"NPROC_PER_NODE": 32, "PIPELINE_PARALLEL_SIZE": 2},
        "trained without a pipeline",
        1,
    ),
    (
        "trn1.32xlarge",
        "llama 3.2 3B",
        {"NPROC_PER_NODE": 32, "PIPELINE_PARALLEL_SIZE": 32},
        "above the model's 28 layers",
        1,
    ),
    (
        "trn1.32xlarge",
        "llama 2 7B",
        {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 4, "PIPELINE_PARALLEL_SIZE": 2},
        "laid out",
        1,
    ),
    (
        "trn2.48xlarge",
        "llama 3 8B",
        {"NPROC_PER_NODE": 64, "TENSOR_PARALLEL_SIZE": 8},
        "Trainium2 does not connect",
        1,
    ),
    (
        "trn2.48xlarge",
        "llama 3 8B",
        {"NPROC_PER_NODE": 64, "TENSOR_PARALLEL_SIZE": 32},
        "Trainium2 does not connect",
        1,
    ),
    (
        "trn2.3xlarge",
        "llama 3 8B",
        {"NPROC_PER_NODE": 8, "TENSOR_PARALLEL_SIZE": 4},
        "above the 4 cores here",
        1,
    ),
    (
        "trn1.32xlarge",
        "gpt2",
        {"NPROC_PER_NODE": 2},
        "is a gpt2, which the neuron backend does not train or compile",
        1,
    ),
    ("trn1.32xlarge", "with biases", {"NPROC_PER_NODE": 2}, "has biases (attention_bias", 1),
    ("trn1.32xlarge", "sliding", {"NPROC_PER_NODE": 2}, "sliding window of 1024 tokens", 1),
    (
        "trn1.32xlarge",
        "of uneven heads",
        {"NPROC_PER_NODE": 2},
        "hidden size 1000 is not a multiple of its 16",
        1,
    ),
    (
        "trn1.32xlarge",
        "llama 2 7B",
        {"LORA_R": 8, "LORA_TARGET_MODULES": "q_proj gate_proj"},
        "gate_proj without up_proj",
        1,
    ),
    (
        "trn1.32xlarge",
        "llama 2 7B",
        {"LORA_R": 8, "LORA_TARGET_MODULES": "q_proj qkv"},
        "names qkv",
        1,
    ),
    ("trn1.32xlarge", "llama 2 7B", {"LORA_R": 8, "LORA_TARGET_MODULES": " "}, "names no layer", 1),
    (
        "trn1.32xlarge",
        "llama 3 8B",
        {
            "NPROC_PER_NODE": 32,
            "TENSOR_PARALLEL_SIZE": 32,
            "LORA_R": 8,
            "LORA_TARGET_MODULES": "q_proj v_proj",
        },
        "q_proj, v_proj without k_proj; they are one layer in training with 8 KV heads",
        1,
    ),
    (
        "trn1.32xlarge",
        "llama 2 7B",
        {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 3},
        "NPROC_PER_NODE=32 is not a multiple of TENSOR_PARALLEL_SIZE=3",
        2,
    ),
    (
        "trn1.32xlarge",
        "llama 2 7B",
        {"NPROC_PER_NODE": 8, "TENSOR_PARALLEL_SIZE": 8, "MAX_LENGTH": 2052},
        "MAX_LENGTH=2052 is not a",
        1,
    ),
    (
        "trn1.2xlarge",
        "llama 3.2 3B",
        {"NPROC_PER_NODE": 16, "TENSOR_PARALLEL_SIZE": 16},
        "above the 2 cores",
        3,
    ),
]


def refusals(config: Any, given: dict[str, Any]) -> list[str]:
    """All that is said against these settings: by the settings themselves, else by the topology."""
    try:
        settings = Settings.read({name: str(value) for name, value in given.items()})
    except InputError as error:
        return error.problems
    return topology_problems(settings, config)


@pytest.mark.parametrize(
    ("instance", "model", "given"),
    WORKS,
    ids=[f"{m} on {i}: {list(g.values())}" for i, m, g in WORKS],
)
def test_what_works_is_not_refused(
    fake_machine: FakeMachine, instance: str, model: str, given: dict[str, Any]
) -> None:
    fake_machine.is_a(instance)
    assert refusals(MODELS[model], given) == []


@pytest.mark.parametrize(
    ("instance", "model", "given", "words", "count"),
    REFUSED,
    ids=[f"{m} on {i}: {list(g.values())}" for i, m, g, _, _ in REFUSED],
)
def test_what_cannot_work_is_refused_with_its_numbers(
    fake_machine: FakeMachine,
    instance: str,
    model: str,
    given: dict[str, Any],
    words: str,
    count: int,
) -> None:
    fake_machine.is_a(instance)
    problems = refusals(MODELS[model], given)
    assert len([problem for problem in problems if words in problem]) == 1, problems
    assert len(problems) <= count, problems
    assert all(problem.endswith(".") and len(problem) < 400 for problem in problems)


@pytest.mark.parametrize(
    ("instance", "model", "given", "remedy"),
    [
        (
            "trn1.2xlarge",
            "llama 2 7B",
            {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 8},
            "Set NPROC_PER_NODE=2 TENSOR_PARALLEL_SIZE=2.",
        ),
        (
            "trn1.32xlarge",
            "llama 2 7B",
            {"NPROC_PER_NODE": 16, "TENSOR_PARALLEL_SIZE": 8},
            "Set NPROC_PER_NODE=32.",
        ),
        (
            "trn1.32xlarge",
            "llama 3.2 3B",
            {"NPROC_PER_NODE": 32, "TENSOR_PARALLEL_SIZE": 16},
            "Set TENSOR_PARALLEL_SIZE=8.",
        ),
        (
            "trn1.32xlarge",
            "granite 2B",
            {"NPROC_PER_NODE": 32, "PIPELINE_PARALLEL_SIZE": 2},
            "Set PIPELINE_PARALLEL_SIZE=1.",
        ),
        (
            "trn2.48xlarge",
            "llama 3 8B",
            {"NPROC_PER_NODE": 64, "TENSOR_PARALLEL_SIZE": 8},
            "Set TENSOR_PARALLEL_SIZE=16.",
        ),
    ],
)
def test_the_remedy_is_the_nearest_that_works(
    fake_machine: FakeMachine, instance: str, model: str, given: dict[str, Any], remedy: str
) -> None:
    fake_machine.is_a(instance)
    assert [
        problem[problem.index(" Set ") + 1 :] for problem in refusals(MODELS[model], given)
    ] == [remedy]


@st.composite
def trainings(draw: st.DrawFn) -> tuple[Settings, Any, Hardware]:
    """Settings that `Settings` itself accepts, a model of odd sizes, and a machine."""
    heads = draw(st.sampled_from([1, 3, 8, 12, 24, 32, 40]))
    kv_heads = draw(
        st.sampled_from([count for count in (1, 2, 3, 4, 8, heads) if heads % count == 0])
    )
    kind = draw(st.sampled_from([LlamaConfig, Qwen3Config, GraniteConfig]))
    config = kind(
        vocab_size=draw(st.sampled_from([32000, 50257, 128256, 151936])),
        hidden_size=64 * heads,
        intermediate_size=draw(st.sampled_from([688, 3072, 11008])),
        num_hidden_layers=draw(st.integers(1, 40)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    tp, pp = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    settings = Settings(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        nproc_per_node=tp * pp * draw(st.integers(1, 8)),
        max_length=tp * draw(st.sampled_from([5, 9, 64, 256])),
    )
    name = draw(st.sampled_from(list(NEURON_MACHINES)))
    return (
        settings,
        config,
        Hardware(
            draw(st.sampled_from([0, NEURON_MACHINES[name].cores])),
            name,
            "trn2" if name.startswith("trn2") else "trn1",
        ),
    )


@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trainings())
def test_every_remedy_works_when_it_is_applied(training: tuple[Settings, Any, Hardware]) -> None:
    settings, config, machine = training
    sizes = Sizes.of(settings)
    found = list(size_problems(sizes, machine, config))
    remedy = sizes.changed_to(nearest(settings, machine, config))
    assert bool(found) == bool(remedy)  # who has nothing to fix is told to change nothing
    changes = {name.lower(): int(value) for name, value in re.findall(r"(\w+)=(\d+)", remedy)}
    mended = replace(settings, **changes)
    assert list(size_problems(Sizes.of(mended), machine, config)) == []
    assert Settings.read(mended.environment()) == mended  # the settings' own rules hold as well


def test_a_machine_without_neuron_cores_is_said_to_have_none(fake_machine: FakeMachine) -> None:
    settings = Settings(nproc_per_node=32, tensor_parallel_size=8)
    assert topology_problems(settings, MODELS["llama 2 7B"]) == []
    [problem] = machine_problems(settings, {"train"})
    assert "No NeuronCores here" in problem
    assert "BACKEND=torch" in problem
    assert not list(machine_problems(settings, {"data", "compile-inference"}))


def test_the_cores_are_those_that_neuron_ls_tells(fake_machine: FakeMachine) -> None:
    fake_machine.is_a("trn1.32xlarge")
    fake_machine.lists(devices=4)
    assert neuron_cores() == (8, "neuron-ls: 4 devices, 8 cores")


@pytest.mark.parametrize(
    "told", [{"instance_type": "trn2.3xlarge", "logical_neuroncore_config": 2}, {}]
)
def test_logical_cores_of_trainium2_are_counted_as_neuron_ls_counts_them(
    fake_machine: FakeMachine, told: dict[str, object]
) -> None:
    fake_machine.lists(devices=1, cores_per_device=4, **told)
    assert neuron_cores() == (4, "neuron-ls: 1 device, 4 cores")
    assert (
        topology_problems(Settings(nproc_per_node=4, tensor_parallel_size=4), MODELS["llama 3 8B"])
        == []
    )


@pytest.mark.parametrize(
    "script",
    [
        "exit 1",
        "echo no JSON",
        "echo '{}'",
        "echo '[1]'",
        "echo '[{\"nc_count\": null}]'",
        "echo '[]'",
        "echo '[{\"nc_count\": 2}]'; exit 1",
    ],
)
def test_where_neuron_ls_fails_the_device_nodes_are_counted(
    fake_machine: FakeMachine, script: str
) -> None:
    fake_machine.is_a("trn1.32xlarge")
    fake_machine.program("neuron-ls", script)
    cores, source = neuron_cores()
    assert cores == 32
    assert "16 devices x 2 cores of a trn1.32xlarge" in source


@pytest.mark.parametrize("name", list(NEURON_MACHINES))
def test_every_instance_has_its_cores_by_its_device_nodes(
    fake_machine: FakeMachine, name: str
) -> None:
    fake_machine.is_a(name)
    (fake_machine.dev / "neuron_rdma").touch()
    assert neuron_cores()[0] == NEURON_MACHINES[name].cores


@pytest.mark.parametrize(
    ("visible", "number", "cores"),
    [
        ("0-7", "", 8),
        ("4", "", 1),
        ("0,2,4-5", "", 4),
        ("", "2", 2),
        ("0-7", "2", 2),
        ("30-40", "", 2),
        ("", "99", 32),
        ("7-0", "", 0),
    ],
)
def test_what_the_runtime_is_told_to_use_is_what_there_is(
    fake_machine: FakeMachine, visible: str, number: str, cores: int
) -> None:
    fake_machine.is_a("trn1.32xlarge")
    fake_machine.sets("NEURON_RT_VISIBLE_CORES", visible)
    fake_machine.sets("NEURON_RT_NUM_CORES", number)
    found, source = neuron_cores()
    assert found == cores
    assert (f"NEURON_RT_VISIBLE_CORES={visible}" in source) == bool(visible)


@pytest.mark.parametrize(
    ("name", "value"), [("NEURON_RT_VISIBLE_CORES", "all"), ("NEURON_RT_NUM_CORES", "-1")]
)
def test_a_list_of_cores_that_is_none_is_refused(
    fake_machine: FakeMachine, name: str, value: str
) -> None:
    fake_machine.is_a("trn1.32xlarge")
    fake_machine.sets(name, value)
    with pytest.raises(InputError, match=name):
        neuron_cores()
