"""The command of a training on Neuron: the same for precompile and train, and what its graphs
depend on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.backends.neuron.arguments import (
    attention_implementation,
    environment,
    training_arguments,
    training_command,
)
from stages.backends.neuron.graph_key import graph_key, recompilations
from stages.backends.neuron.precompile import precompile_command
from stages.run.layout import PRECOMPILE_FILE
from stages.run.settings import Settings
from tests.conftest import ROOT

LLAMA = Settings(
    model_id=str(ROOT / "data/demo/model"),
    init_weights="pretrained",
    nproc_per_node=32,
    tensor_parallel_size=8,
    max_length=2048,
    gradient_accumulation_steps=16,
    gradient_checkpointing=True,
    logging_steps=10,
)


def flags(command: list[str]) -> dict[str, str]:
    """Flag -> value of a command's worker."""
    worker = command[command.index("-m") + 2 :]
    return dict(zip(worker[::2], worker[1::2], strict=True))


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path("/models/base")
    monkeypatch.setattr(
        "stages.backends.neuron.precompile.base_model_folder", lambda settings: folder
    )
    return folder


def test_precompile_runs_the_command_of_train_for_fewer_steps_and_saves_nothing(base: Path) -> None:
    data = Path("outputs/run/data")
    train = training_command(LLAMA, base, data, Path("work"), steps=72)
    precompile = precompile_command(LLAMA, data, Path("rehearsal"))
    assert precompile[:3] == [
        "neuron_parallel_compile",
        "--parallel_compile_workdir",
        str(Path("rehearsal/compile").absolute()),
    ]
    assert (
        precompile[3 : precompile.index("-m") + 2] == train[: train.index("-m") + 2]
    )  # torchrun, its options, the worker
    before, after = flags(train), flags(precompile[3:])
    assert before.keys() == after.keys()
    assert {
        name: (before[name], after[name]) for name in before if before[name] != after[name]
    } == {
        "--work": ("work", "rehearsal"),
        "--output_dir": ("work/checkpoints", "rehearsal/checkpoints"),
        "--max_steps": ("72", "6"),  # the step that is logged, and five more
        "--logging_steps": ("10", "1"),
        "--save_strategy": ("steps", "no"),
        "--save_steps": ("100", "1"),
    }


# neuron_parallel_compile --help (aws-neuron-sdk, torch-neuronx 2.8): it parses the whole command
# line, with abbreviations.
OPTIONS_OF_THE_TOOL = (
    *(
        "--command",
        "--num_parallel",
        "--node_id",
        "--world_size",
        "--static_schedule",
        "--analyze-output",
        "--analyze-verbosity",
    ),
    *("--parallel_compile_workdir", "--log_level", "--help"),
)


def test_neuron_parallel_compile_takes_no_flag_of_the_workers_for_its_own(base: Path) -> None:
    emitted = flags(
        precompile_command(replace(LLAMA, lora_r=8), Path("data"), Path("rehearsal"))[3:]
    )
    assert not [
        (flag, option)
        for flag in emitted
        for option in OPTIONS_OF_THE_TOOL
        if option.startswith(flag)
    ]


def test_what_upstream_would_lose_is_always_switched(base: Path) -> None:
    given = training_arguments(LLAMA, Path("out"), 72)
    assert (given["save_only_model"], given["skip_cache_push"], given["report_to"]) == (
        "true",
        "true",
        "none",
    )


@pytest.mark.parametrize(
    ("length", "kernel"),
    [(2048, "flash_attention_2"), (4096, "flash_attention_2"), (1024, "eager"), (2050, "eager")],
)
def test_flash_attention_is_used_where_the_length_allows_it(length: int, kernel: str) -> None:
    assert attention_implementation(length) == kernel


def test_the_compile_cache_is_said_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURON_CC_FLAGS", raising=False)
    found = environment(replace(LLAMA, neuron_compile_cache_url="/cache/neuron"))
    assert found["NEURON_COMPILE_CACHE_URL"] == "/cache/neuron"
    assert (
        found["NEURON_CC_FLAGS"]
        == "--model-type transformer --retry_failed_compilation --cache_dir=/cache/neuron"
    )


def test_a_bucket_is_not_handed_over_as_a_folder() -> None:
    found = environment(replace(LLAMA, neuron_compile_cache_url="s3://bucket/graphs"))
    assert found["NEURON_COMPILE_CACHE_URL"] == "s3://bucket/graphs"
    assert "--cache_dir" not in found["NEURON_CC_FLAGS"]


def test_the_callers_compiler_flags_are_kept_but_for_another_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NEURON_CC_FLAGS", "--cache_dir=/elsewhere -O1")
    assert (
        environment(LLAMA)["NEURON_CC_FLAGS"] == f"-O1 --cache_dir={LLAMA.neuron_compile_cache_url}"
    )


def test_this_pythons_programs_come_before_those_on_the_callers_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/first:/second")
    assert environment(LLAMA)["PATH"] == f"{Path(sys.executable).parent}:/first:/second"


def test_an_empty_cache_repository_is_not_handed_on() -> None:
    assert "CUSTOM_CACHE_REPO" not in environment(LLAMA)
    assert (
        environment(replace(LLAMA, custom_cache_repo="me/cache"))["CUSTOM_CACHE_REPO"] == "me/cache"
    )


def test_training_asks_the_hub_for_graphs_only_where_a_repository_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert environment(LLAMA)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in environment(replace(LLAMA, custom_cache_repo="me/cache"))


def test_the_length_of_a_warm_up_shapes_no_graph() -> None:
    assert graph_key(replace(LLAMA, warmup_steps=3)) == graph_key(replace(LLAMA, warmup_steps=9))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            {
                "learning_rate": 1e-4,
                "seed": 7,
                "num_train_epochs": 9,
                "logging_steps": 5,
                "weight_decay": 0.0,
            },
            None,
        ),
        ({"max_length": 1024}, "row"),
        ({"tensor_parallel_size": 4}, "tensor_parallel_size"),
        ({"nproc_per_node": 8}, "processes"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps"),
        ({"weight_decay": 0.1}, "weight decay"),
        ({"max_grad_norm": 0.0}, "gradient clipping"),
        ({"warmup_steps": 3}, "warm-up"),
        ({"lora_r": 8}, "LoRA"),
    ],
)
def test_graphs_depend_on_shapes_and_not_on_rates(change: dict[str, Any], part: str | None) -> None:
    before, after = graph_key(LLAMA), graph_key(replace(LLAMA, **change))
    changed = [name for name in before if before[name] != after[name]]
    assert (changed == []) if part is None else (part in changed)


def published(folder: Path, settings: Settings, cache: Path, graphs: list[str]) -> Path:
    """What precompile leaves in `folder`, and graphs in `cache`."""
    for graph in graphs:
        (cache / graph).mkdir(parents=True)
        (cache / graph / "model.neff").write_bytes(b"neff")
        (cache / graph / "model.done").touch()
    (folder / PRECOMPILE_FILE).write_text(
        json.dumps({"graph_key": graph_key(settings), "graph_names": graphs})
    )
    return folder


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache at a path that optimum-neuron can read: no dots."""
    return tmp_path_factory.mktemp("cache")


GRAPHS = ["neuronxcc-2.21/MODULE_1+a", "neuronxcc-2.21/MODULE_2+a"]


def test_train_compiles_nothing_again_after_precompile(tmp_path: Path, cache: Path) -> None:
    settings = replace(LLAMA, neuron_compile_cache_url=str(cache))
    assert list(recompilations(settings, published(tmp_path, settings, cache, GRAPHS))) == []


def test_train_says_when_precompile_ran_for_other_graphs(tmp_path: Path, cache: Path) -> None:
    settings = replace(LLAMA, neuron_compile_cache_url=str(cache))
    (said,) = recompilations(
        replace(settings, gradient_accumulation_steps=8),
        published(tmp_path, settings, cache, GRAPHS),
    )
    assert "gradient_accumulation_steps 16 -> 8" in said


def test_train_says_when_the_cache_has_lost_graphs(tmp_path: Path, cache: Path) -> None:
    settings = replace(LLAMA, neuron_compile_cache_url=str(cache))
    folder = published(tmp_path, settings, cache, GRAPHS)
    (cache / GRAPHS[0] / "model.neff").unlink()
    (said,) = recompilations(settings, folder)
    assert "1 of precompile's 2 graphs" in said


def test_train_says_when_precompile_has_not_run(tmp_path: Path) -> None:
    (said,) = recompilations(LLAMA, tmp_path)
    assert "precompile has not run" in said
