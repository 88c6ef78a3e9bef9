"""Every shipped recipe, with its model's own config.json, on the machines that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stages.checks import local_config, problems
from stages.model.size import parameters
from stages.run.recipe import RECIPES, read_recipe
from stages.run.setting import STAGES
from stages.run.settings import Settings, with_recipe
from tests.conftest import ROOT
from tests.fakes.neuron_machine import FakeMachine

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
KEYS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("tie_word_embeddings", "rope_scaling"),
)
# The values of these keys in each model's config.json, and the parameters that the Hub shows.
MODELS: dict[str, tuple[tuple[Any, ...], int]] = {
    "llama2-7b": (
        ("llama", 32000, 4096, 11008, 32, 32, 32, 128, 4096, False, None),
        6_738_415_616,
    ),
    "llama3.1-8b": (
        ("llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072, False, LLAMA3_ROPE),
        8_030_261_248,
    ),
    "qwen3-0.6b": (
        ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, 40960, True, None),
        596_049_920,
    ),
    "qwen3-8b": (
        ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, 40960, False, None),
        8_190_735_360,
    ),
    "smollm2-135m": (
        ("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, True, None),
        134_515_008,
    ),
}
# Bytes of one core of trn1 (32 GiB for the two of a device), one GPU, a laptop.
MEMORY = {
    "trn1.32xlarge": 16 * 2**30,
    "H100": 80 * 10**9,
    "H200": 141 * 10**9,
    "laptop": 16 * 10**9,
}
ONE_GPU = {
    "BACKEND": "torch",
    "NPROC_PER_NODE": "1",
    "TENSOR_PARALLEL_SIZE": "1",
    "LORA_R": "16",
}
RUNS = [
    *((recipe, "trn1.32xlarge") for recipe in ("llama2-7b", "llama3.1-8b", "qwen3-8b")),
    *((recipe, place) for recipe in ("smollm2-135m", "qwen3-0.6b") for place in ("laptop", "H100")),
]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    monkeypatch.chdir(ROOT)  # PROMPTS of a recipe is a path in the project
    return FakeMachine(tmp_path / "machine", monkeypatch)


def settings_of(recipe: str, folder: Path, **overrides: str) -> Settings:
    """The recipe's settings, with its model in `folder`."""
    values, _ = MODELS[recipe]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(zip(KEYS, values, strict=True))))
    environment = with_recipe({"RECIPE": recipe, **overrides, "MODEL_ID": str(folder)})
    return Settings.read({key: environment[key] for key in environment if key != "RECIPE"})


def bytes_per_process(settings: Settings, count: int) -> float:
    """Weights, gradients and AdamW of a training of all `count` parameters, without activations.

    torch shards 16 bytes a parameter over all processes (FSDP2: float32 weights, gradients, two
    moments), and each keeps its layers in bfloat16 from the forward to the backward pass. ZeRO-1 on
    Neuron divides bfloat16 weights and at most float32 gradients by tensor parallelism only, and
    the optimizer's 12 bytes (float32 weights, two moments) by data parallelism too.
    """
    if settings.backend == "torch":
        return 16 * count / settings.nproc_per_node + 2 * count / settings.tensor_parallel_size
    layers = settings.tensor_parallel_size * settings.pipeline_parallel_size
    return count / layers * (6 + 12 / (settings.nproc_per_node / layers))


def test_each_recipe_but_the_demos_is_checked_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.mk")} == {*MODELS, "demo"}


@pytest.mark.parametrize("recipe, place", RUNS)
def test_no_stage_refuses_a_recipe_on_a_machine_that_it_names_and_the_training_fits(
    recipe: str, place: str, tmp_path: Path, machine: FakeMachine
) -> None:
    backend = "torch"
    if place == "trn1.32xlarge":
        machine.is_a(place)
        backend = "neuron"
    settings = settings_of(recipe, tmp_path / "model", BACKEND=backend)
    assert place in (RECIPES / f"{recipe}.mk").read_text(encoding="utf-8")
    assert problems(settings, local_config(settings.model_id), STAGES) == []
    assert parameters(settings) == MODELS[recipe][1]
    # A quarter is left to activations.
    assert bytes_per_process(settings, parameters(settings)) < 0.75 * MEMORY[place]


@pytest.mark.parametrize("recipe", ["llama3.1-8b", "qwen3-8b"])
def test_a_model_of_8_billion_parameters_fits_one_gpu_with_lora_only_as_its_recipe_says(
    recipe: str, tmp_path: Path, machine: FakeMachine
) -> None:
    settings = settings_of(recipe, tmp_path / "model", **ONE_GPU)
    assert problems(settings, local_config(settings.model_id), STAGES) == []
    count = parameters(settings)
    whole = bytes_per_process(settings, count)
    assert whole > MEMORY["H200"] > MEMORY["H100"]
    # Even if the frozen weights are in float32, with a copy in bfloat16.
    assert 6 * count < 0.75 * MEMORY["H100"]
    text = (RECIPES / f"{recipe}.mk").read_text(encoding="utf-8")
    named = " ".join(f"{name}={value}" for name, value in ONE_GPU.items())
    assert named in text and f"{whole / 1e9:.0f} GB" in text


@pytest.mark.parametrize("recipe", MODELS)
def test_a_recipe_for_dolly_pins_its_revision_and_starts_from_the_models_weights(
    recipe: str,
) -> None:
    values = {name: value for name, (value, _) in read_recipe(recipe).items()}
    assert re.fullmatch("[0-9a-f]{40}", values["DATASET_REVISION"])
    assert values.get("INIT_WEIGHTS", "pretrained") == "pretrained"
