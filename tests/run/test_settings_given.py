"""Wrong settings, through the real make: all named at once, status 2, nothing run, and no word of
them read by a shell."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Project, clean_environment, copy_project

pytestmark = pytest.mark.torture("settings")

LONG = 100_000  # characters; a command takes 131,071 (MAX_ARG_STRLEN)
TYPED, EXPORTED = "typed", "exported"

# How it is given, the settings, what is said.
WRONG: list[tuple[str, dict[str, str], list[str]]] = [
    # The wrong type.
    (TYPED, {"LEARNING_RATE": "fast"}, ["LEARNING_RATE='fast' is not a number"]),
    (TYPED, {"MAX_LENGTH": "2048.5"}, ["MAX_LENGTH='2048.5' is not a whole number"]),
    (EXPORTED, {"MAX_LENGTH": "1e3"}, ["MAX_LENGTH='1e3' is not a whole number"]),
    (TYPED, {"SEED": "0x2a"}, ["SEED='0x2a' is not a whole number"]),
    (TYPED, {"SEED": "1,000"}, ["SEED='1,000' is not a whole number"]),
    (EXPORTED, {"SEED": "_1"}, ["SEED='_1' is not a whole number"]),
    (TYPED, {"LORA_R": "VIII"}, ["LORA_R='VIII' is not a whole number"]),
    (TYPED, {"TOP_K": "½"}, ["TOP_K='½' is not a whole number"]),
    (EXPORTED, {"NPROC_PER_NODE": "٣x"}, ["NPROC_PER_NODE='٣x' is not a whole number"]),
    (TYPED, {"BF16": "maybe"}, ["BF16='maybe' is neither 1 nor 0"]),
    (TYPED, {"ZERO_1": "2"}, ["ZERO_1='2' is neither 1 nor 0"]),
    (TYPED, {"MAX_SHARD_SIZE": "five"}, ["MAX_SHARD_SIZE: 'five' is not a size"]),
    (
        TYPED,
        {"PACKING": "bestfit"},
        ["PACKING='bestfit' is none of best_fit, concat. Did you mean best_fit?"],
    ),
    (EXPORTED, {"BACKEND": "TORCH"}, ["BACKEND='TORCH' is none of auto, torch, neuron"]),
    (TYPED, {"RESUME": "weights "}, ["RESUME='weights ' is none of", "Did you mean weights?"]),
    (
        TYPED,
        {"NEURON_COMPILE_CACHE_URL": "relative/path"},
        ["'relative/path' cannot hold compiled graphs"],
    ),
    # Out of range.
    (TYPED, {"LEARNING_RATE": "-1"}, ["LEARNING_RATE=-1 must be above 0"]),
    (TYPED, {"LEARNING_RATE": "0"}, ["LEARNING_RATE=0 must be above 0"]),
    (TYPED, {"LEARNING_RATE": "1e400"}, ["LEARNING_RATE=1e400 must be at most 10"]),
    (EXPORTED, {"LEARNING_RATE": "1e-400"}, ["LEARNING_RATE=1e-400 must be above 0"]),
    (TYPED, {"LEARNING_RATE": "nan"}, ["LEARNING_RATE=nan must be"]),
    (TYPED, {"WEIGHT_DECAY": "-inf"}, ["WEIGHT_DECAY=-inf must be at least 0"]),
    (TYPED, {"MAX_GRAD_NORM": "inf"}, ["MAX_GRAD_NORM=inf must be finite"]),
    (
        TYPED,
        {"PER_DEVICE_TRAIN_BATCH_SIZE": "0"},
        ["PER_DEVICE_TRAIN_BATCH_SIZE=0 sequences must be at least 1"],
    ),
    (
        TYPED,
        {"GRADIENT_ACCUMULATION_STEPS": "0"},
        ["GRADIENT_ACCUMULATION_STEPS=0 must be at least 1"],
    ),
    (
        EXPORTED,
        {"NUM_TRAIN_EPOCHS": "0"},
        ["NUM_TRAIN_EPOCHS=0 epochs must be "],
    ),
    (TYPED, {"MAX_LENGTH": "1"}, ["MAX_LENGTH=1 tokens must be at least 2"]),
    (TYPED, {"MAX_LENGTH": "2000000"}, ["MAX_LENGTH=2000000 tokens must be at most 1,048,576"]),
    (TYPED, {"MAX_STEPS": "-2"}, ["MAX_STEPS=-2 steps must be at least -1"]),
    (TYPED, {"SEED": "-1"}, ["SEED=-1 must be at least 0"]),
    (TYPED, {"SEED": "2147483648"}, ["SEED=2147483648 must be at most 2,147,483,647"]),
    (
        EXPORTED,
        {"SEED": "9" * 4000},
        ["SEED=9999", "(4000 characters) must be at most 2,147,483,647"],
    ),
    (TYPED, {"SEED": "9" * 5000}, ["SEED='9999", "(5000 characters)' is not a whole number"]),
    (TYPED, {"NPROC_PER_NODE": "1000000000"}, ["NPROC_PER_NODE=1000000000 must be at most 4,096"]),
    (TYPED, {"VALIDATION_FRACTION": "1"}, ["VALIDATION_FRACTION=1 fraction must be below 1"]),
    (
        EXPORTED,
        {"VALIDATION_FRACTION": "-0.1"},
        ["VALIDATION_FRACTION=-0.1 fraction must be at least 0"],
    ),
    (TYPED, {"TOP_P": "0"}, ["TOP_P=0 must be above 0"]),
    (TYPED, {"TOP_P": "1.1"}, ["TOP_P=1.1 must be at most 1"]),
    (TYPED, {"TEMPERATURE": "1e-300"}, ["TEMPERATURE=1e-300 must be at least 0.001"]),
    (TYPED, {"MAX_SHARD_SIZE": "0GB"}, ["MAX_SHARD_SIZE: '0GB' is less than one byte"]),
    # Contradictory, in themselves or with the model's config.json.
    (TYPED, {"MAX_STEPS": "0"}, ["MAX_STEPS=0 trains nothing"]),
    (
        TYPED,
        {"NPROC_PER_NODE": "3", "TENSOR_PARALLEL_SIZE": "2"},
        ["NPROC_PER_NODE=3 is not a multiple of TENSOR_PARALLEL_SIZE=2"],
    ),
    (
        EXPORTED,
        {"NPROC_PER_NODE": "4", "PIPELINE_PARALLEL_SIZE": "3"},
        ["x PIPELINE_PARALLEL_SIZE=3", "a multiple of 3"],
    ),
    (
        TYPED,
        {"NPROC_PER_NODE": "2", "TENSOR_PARALLEL_SIZE": "2", "MAX_LENGTH": "63"},
        ["MAX_LENGTH=63 is not a multiple"],
    ),
    (TYPED, {"CONTEXT": "alone"}, ["CONTEXT without PROMPT"]),
    (TYPED, {"MAX_LENGTH": "514"}, ["MAX_LENGTH=514 is above the model's 512 positions"]),
    (
        TYPED,
        {"NPROC_PER_NODE": "8", "TENSOR_PARALLEL_SIZE": "8"},
        ["TENSOR_PARALLEL_SIZE=8 does not divide the model's 4 att"],
    ),
    (
        EXPORTED,
        {"NPROC_PER_NODE": "3", "TENSOR_PARALLEL_SIZE": "3", "MAX_LENGTH": "600"},
        ["4 attention heads, 64 intermediate columns, 2 KV heads", "MAX_LENGTH=600"],
    ),
    # Empty, or white space alone.
    (TYPED, {"LEARNING_RATE": ""}, ["LEARNING_RATE='' is not a number"]),
    (EXPORTED, {"MODEL_ID": ""}, ["MODEL_ID is empty"]),
    (TYPED, {"DATASET": "  "}, ["DATASET is empty"]),
    (TYPED, {"BF16": ""}, ["BF16='' is neither 1 nor 0"]),
    (EXPORTED, {"RESPONSE_COLUMN": ""}, ["RESPONSE_COLUMN is empty"]),
    (EXPORTED, {"INSTRUCTION_COLUMN": ""}, ["INSTRUCTION_COLUMN is empty, for texts without"]),
    # Unknown.
    (
        TYPED,
        {"LEARNIG_RATE": "1"},
        ["LEARNIG_RATE is not a setting. Did you mean LEARNING_RATE?"],
    ),
    (
        TYPED,
        {"learning_rate": "1"},
        ["learning_rate is not a setting. Did you mean LEARNING_RATE?"],
    ),
    (TYPED, {"XYZZY": "1"}, ["XYZZY is not a setting. `make help` lists them."]),
    (
        TYPED,
        {"LEARNING RATE": "1"},
        ["'RATE=1' is not a setting: its name must not contain spaces"],
    ),
    (TYPED, {"SEED;touch pwned;": "1"}, ["is not a setting"]),
    (TYPED, {"SÉED": "1"}, ["is not a setting. Did you mean SEED?"]),
    (TYPED, {"\x1b[2J": "1"}, ["'\\x1b[2J' is not a setting"]),
    (TYPED, {"S" * 30_000: "1"}, ["is not a setting"]),
    # Long.
    (TYPED, {"SEED": "x" * LONG}, [f"({LONG} characters)' is not a whole number"]),
    (EXPORTED, {"LEARNING_RATE": " " * LONG + "x"}, ["is not a number"]),
    (
        TYPED,
        {"DATASET": "d" * LONG},
        ["DATASET='dddd", "is too long: a path has at most 4,095 bytes"],
    ),
    (EXPORTED, {"MODEL_ID": "m/" + "é" * 200}, ["MODEL_ID='m/é", "each name in it 255"]),
    (
        TYPED,
        {"PROMPT": "p" * LONG, "CONTEXT": "c" * LONG},
        ["Argument list too long", "status 127"],
    ),
    (TYPED, {"RUN": "r" * 30_000}, ["RUN has 30,000 characters. Choose a name of at most 200."]),
    # What a shell, make or a terminal would read.
    (TYPED, {"SEED": "$(touch pwned)"}, ["SEED='$(touch pwned)' is not a whole number"]),
    (
        EXPORTED,
        {"SEED": "$(shell touch pwned)"},
        ["SEED='$(shell touch pwned)' is not a whole number"],
    ),
    (TYPED, {"OVERLONG": "`touch pwned`"}, ["OVERLONG='`touch pwned`' is none of"]),
    (
        TYPED,
        {"LEARNING_RATE": "1e-4; touch pwned"},
        ["LEARNING_RATE='1e-4; touch pwned' is not a number"],
    ),
    (
        EXPORTED,
        {"LEARNING_RATE": "1e-4 | touch pwned"},
        ["LEARNING_RATE='1e-4 | touch pwned' is not a number"],
    ),
    (TYPED, {"TOP_K": "& touch pwned &"}, ["TOP_K='& touch pwned &' is not a whole number"]),
    (TYPED, {"SEED": "'; touch pwned; '"}, ["is not a whole number"]),
    (TYPED, {"SEED": '"; touch pwned; "'}, ["is not a whole number"]),
    (EXPORTED, {"SEED": "1\ntouch pwned\n"}, ["SEED='1\\ntouch pwned\\n' is not a whole number"]),
    (TYPED, {"SEED": "1\\\n\ttouch pwned"}, ["is not a whole number"]),
    (TYPED, {"SEED": "1 # 2"}, ["SEED='1 # 2' is not a whole number"]),
    (TYPED, {"SEED": "%"}, ["SEED='%' is not a whole number"]),
    (TYPED, {"SEED": "*"}, ["SEED='*' is not a whole number"]),
    (TYPED, {"SEED": "--help"}, ["SEED='--help' is not a whole number"]),
    (TYPED, {"SEED": "\x1b[31m1"}, ["SEED='\\x1b[31m1' is not a whole number"]),
    (TYPED, {"INSTANCE_PRICE": "> pwned"}, ["INSTANCE_PRICE='> pwned' is not a number"]),
    (EXPORTED, {"DATASET_SPLIT": "\udcff"}, ["DATASET_SPLIT='\\udcff' is not UTF-8"]),
    (TYPED, {"RUN": "a;touch${IFS}pwned"}, ["must be the name of a folder in outputs"]),
    (EXPORTED, {"RUN": "$(touch${IFS}pwned)"}, ["must be the name of a folder in outputs"]),
    (TYPED, {"RUN": "`touch${IFS}pwned`"}, ["must be the name of a folder in outputs"]),
    (TYPED, {"RUN": "a:b"}, ["must be the name of a folder in outputs"]),
    (TYPED, {"RUN": "../up"}, ["must be the name of a folder in outputs"]),
    # Many at once, each named.
    (
        TYPED,
        {
            "LEARNING_RATE": "-1",
            "TOP_P": "2",
            "LEARNIG_RATE": "1",
            "PACKING": "none",
            "SEED": "$(touch pwned)",
            "MAX_STEPS": "0",
            "CONTEXT": "c",
        },
        [
            "LEARNING_RATE=-1",
            "TOP_P=2",
            "LEARNIG_RATE is",
            "PACKING='none'",
            "SEED='$(touch",
            "MAX_STEPS=0",
            "CONTEXT without",
        ],
    ),
    (
        EXPORTED,
        {"BF16": "2", "EVAL_STEPS": "-1", "TOP_K": "many", "MODEL_ID": ""},
        ["BF16='2'", "EVAL_STEPS=-1", "TOP_K='many'", "MODEL_ID is empty"],
    ),
]


def refused(project: Project, *arguments: str, **environment: str) -> str:
    """What `make train` says; it must end with 2 and have done nothing."""
    done = project.make("train", *arguments, check=False, **environment)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stdout == ""
    assert "Traceback" not in done.stderr and len(done.stderr) < 2500
    assert not (project.folder / "outputs").exists()
    assert not (project.folder / "pwned").exists()
    return done.stderr


@pytest.mark.parametrize(
    ("how", "given", "told"), WRONG, ids=[ascii(given)[1:60] for _, given, _ in WRONG]
)
def test_wrong_settings_are_refused_together_and_nothing_is_run(
    project: Project, how: str, given: dict[str, str], told: list[str]
) -> None:
    if how == EXPORTED:
        message = refused(project, "RECIPE=tiny", **given)
    else:
        message = refused(
            project, "RECIPE=tiny", *(f"{name}={value}" for name, value in given.items())
        )
    assert all(part in message for part in told), message


@pytest.mark.parametrize(
    "given",
    [given for how, given, _ in WRONG if how == EXPORTED and "RUN" not in given][-4:],
    ids=" ".join,
)
def test_a_stage_that_is_run_by_itself_refuses_them_too(
    project: Project, tmp_path: Path, given: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "stages.data", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        command,
        cwd=project.folder,
        env={**clean_environment(), **given},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and all(f"error: {name}" in done.stderr for name in given), (
        done.stderr
    )
    assert not (tmp_path / "out").exists()


@pytest.fixture
def recipe(project: Project) -> Iterator[Path]:
    """A recipe that the test writes."""
    path = project.folder / "recipes/written.mk"
    yield path
    path.unlink()


RECIPES = {
    "random weights for another model": (
        "MODEL_ID ?= data/demo/model\nINIT_WEIGHTS ?= random\n",
        ["RECIPE=written starts MODEL_ID=data/demo/model from random weights; those of MODEL_ID="],
    ),
    "an unknown name": (
        "LEARNIG_RATE ?= 1\n",
        ["written.mk, line 1: LEARNIG_RATE is not a setting. Did you mean LEARNING_RATE?"],
    ),
    "wrong values": (
        "SEED ?= -1\nTOP_P ?= $$(touch pwned)\n",
        [
            "written.mk, line 1: SEED=-1 must",
            "written.mk, line 2: TOP_P='$$(touch pwned)' is not a number",
        ],
    ),
    "10 MB": (f"PROMPT ?= {'x' * 10_000_000}\n", ["has 10,000,011 bytes", "nothing was run"]),
    "a run": ("RUN ?= a;touch${IFS}pwned\n", ["RUN is not a setting"]),
    "code for make": ("X := $(shell touch pwned)\n", ["line 1: 'X := $(shell touch pwned)' sets"]),
    "no recipe at all": ("]]] not make\n", ["written.mk, line 1: ']]] not make' sets nothing"]),
    "bytes": ("\x01\x7f\xff\n", ["written.mk cannot be read"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_recipe_is_refused_too(project: Project, recipe: Path, name: str) -> None:
    text, told = RECIPES[name]
    recipe.write_text(text, encoding="latin-1")
    message = refused(project, "RECIPE=written", MODEL_ID="data/tiny")
    assert all(part in message for part in told), message


@pytest.mark.parametrize("python", ["no-such-python", "false"])
def test_what_cannot_be_asked_for_is_not_taken_for_fresh(tmp_path: Path, python: str) -> None:
    """The rows are published: only a failure to ask which stages are stale can end make with an
    error."""
    project = copy_project(tmp_path / "project")
    project.make("data", "RECIPE=tiny")
    for goal in ("data", "status"):
        assert project.make(goal, "RECIPE=tiny").returncode == 0
        assert project.make(goal, "RECIPE=tiny", f"PYTHON={python}", check=False).returncode == 2


def test_rows_may_be_made_with_settings_that_contradict_the_training_alone(
    project: Project,
) -> None:
    assert project.stages_to_run("data", "RECIPE=tiny", "MAX_LENGTH=600") == ["data"]
