"""What the Neuron backend relies on in the installed optimum-neuron: another release that breaks it
fails here, by name."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from stages.backends.neuron.arguments import environment, training_arguments, training_command
from stages.run.settings import Settings
from tests.conftest import ROOT

pytest.importorskip("optimum.neuron", reason="optimum-neuron has no release for this Python")

LIBRARY = Path(next(iter(importlib.util.find_spec("optimum.neuron").submodule_search_locations)))  # type: ignore[union-attr, arg-type]
FAKES = Path(__file__).parents[2] / "fakes" / "neuron_sdk"

RUNS = {
    "the defaults": Settings(),
    "Llama 2 7B on 32 cores": Settings(
        nproc_per_node=32,
        tensor_parallel_size=8,
        gradient_accumulation_steps=16,
        gradient_checkpointing=True,
        save_steps=50,
        warmup_steps=9,
    ),
    "a pipeline of two": Settings(
        nproc_per_node=8,
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
        lr_scheduler_type="constant",
    ),
    "adapters without ZeRO-1": Settings(
        lora_r=8, zero_1=False, max_grad_norm=0.0, save_steps=0, lr_scheduler_type="linear"
    ),
}


def classes(file: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse((LIBRARY / file).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def method(file: str, owner: str, name: str) -> list[str]:
    """The parameters of a method, or nothing where there is none."""
    found = [
        node
        for node in classes(file)[owner].body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    arguments = found[0].args if found else None
    return (
        [
            argument.arg
            for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        ]
        if arguments
        else []
    )


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS.keys())
def test_every_argument_of_the_worker_is_one_of_optimum_neurons(settings: Settings) -> None:
    body = classes("trainers/training_args.py")["NeuronTrainingArguments"].body
    known = {
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert sorted(training_arguments(settings, Path("out"), 10).keys() - known) == []


@pytest.fixture(scope="module")
def parsed() -> dict[str, dict[str, Any]]:
    """What the real parser makes of our command line, run by run; that of the first run as a whole
    object, with all its checks."""
    code = (
        "import json, sys\n"
        "from transformers import HfArgumentParser\n"
        "from optimum.neuron import NeuronTrainingArguments\n"
        "commands = json.load(sys.stdin)\n"
        "parser = HfArgumentParser(NeuronTrainingArguments)\n"
        "plain = lambda given: {k: v if isinstance(v, (int, float, list)) else str(getattr(v, "
        "'value', v)) for k, v in given.items()}\n"
        "answer = {name: plain(vars(parser.parse_args(command))) for name, command in "
        "commands.items()}\n"
        "whole, = parser.parse_args_into_dataclasses(next(iter(commands.values())))\n"
        "answer['whole'] = plain(vars(whole))\n"
        "print('ANSWER' + json.dumps(answer))\n"
    )
    commands = {
        name: command[command.index("--output_dir") :]
        for name, settings in RUNS.items()
        if (command := command_of(settings))
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "test",
    }
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(FAKES)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(commands),
        env={**os.environ, **alone, **where},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("ANSWER")[2])


def command_of(settings: Settings) -> list[str]:
    return training_command(settings, Path("base"), Path("data"), Path("work"), steps=30)


@pytest.mark.parametrize("run", RUNS)
def test_optimum_neurons_parser_understands_the_settings_as_they_are_meant(
    run: str, parsed: dict[str, dict[str, Any]]
) -> None:
    settings, given = RUNS[run], parsed[run]
    same = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "warmup_steps",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "seed",
        "bf16",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "zero_1",
        "gradient_checkpointing",
        "logging_steps",
        "save_total_limit",
    )
    assert {name: given[name] for name in same} == {name: getattr(settings, name) for name in same}
    assert given["max_steps"] == 30
    assert given["save_strategy"] == ("steps" if settings.save_steps else "no")
    assert given["lr_scheduler_type"] == {"constant": "constant_with_warmup"}.get(
        settings.lr_scheduler_type, settings.lr_scheduler_type
    )
    assert (
        given["save_only_model"],
        given["skip_cache_push"],
        given["resume_from_checkpoint"],
    ) == (True, True, "None")


def test_the_arguments_as_a_whole_are_valid_and_report_to_nobody(
    parsed: dict[str, dict[str, Any]],
) -> None:
    assert parsed["whole"]["report_to"] == []
    assert (
        parsed["whole"]["async_save"],
        parsed["whole"]["use_xser"],
        parsed["whole"]["use_autocast"],
    ) == (False, True, False)


RELIED_ON = [
    (
        "trainers/transformers.py",
        "NeuronTrainer",
        "__init__",
        ["model", "args", "data_collator", "train_dataset"],
    ),
    ("trainers/transformers.py", "NeuronTrainer", "_get_train_sampler", ["self", "train_dataset"]),
    (
        "trainers/transformers.py",
        "NeuronTrainer",
        "create_optimizer_and_scheduler",
        ["self", "num_training_steps"],
    ),
    ("trainers/transformers.py", "NeuronTrainer", "setup_training", ["self", "max_steps"]),
    ("trainers/transformers.py", "NeuronTrainer", "add_callback", ["self", "callback"]),
    ("trainers/transformers.py", "NeuronTrainer", "remove_callback", ["self", "callback"]),
    ("trainers/transformers.py", "NeuronTrainer", "train", ["self"]),
    ("trainers/transformers.py", "NeuronTrainer", "save_model", ["self", "output_dir"]),
    (
        "models/training/modeling_utils.py",
        "NeuronModelMixin",
        "from_pretrained",
        ["cls", "pretrained_model_name_or_path", "trn_config"],
    ),
    (
        "models/training/modeling_utils.py",
        "NeuronModelMixin",
        "save_pretrained",
        ["self", "save_directory"],
    ),
    ("accelerate/optimizer.py", "NeuronAcceleratedOptimizer", "step", ["self"]),
]


@pytest.mark.parametrize(
    ("file", "owner", "name", "parameters"),
    RELIED_ON,
    ids=[f"{owner}.{name}" for _, owner, name, _ in RELIED_ON],
)
def test_a_method_that_the_worker_calls_or_overrides_is_there(
    file: str, owner: str, name: str, parameters: list[str]
) -> None:
    assert [
        parameter for parameter in parameters if parameter not in method(file, owner, name)
    ] == []


@pytest.mark.parametrize(
    "call",
    [
        "create_optimizer_and_scheduler",
        "_get_train_sampler",
        "on_pre_optimizer_step",
        "setup_training",
    ],
)
def test_what_the_worker_overrides_is_used_by_the_trainer(call: str) -> None:
    trainer = classes("trainers/transformers.py")["NeuronTrainer"]
    used = [
        node
        for node in ast.walk(trainer)
        if isinstance(node, ast.Attribute) and node.attr == call and isinstance(node.ctx, ast.Load)
    ]
    assert used


def test_the_training_model_is_built_as_the_worker_builds_it() -> None:
    from_pretrained = next(
        node
        for node in ast.walk(classes("models/training/modeling_utils.py")["NeuronModelMixin"])
        if isinstance(node, ast.FunctionDef) and node.name == "from_pretrained"
    )
    taken = {node.value for node in ast.walk(from_pretrained) if isinstance(node, ast.Constant)}
    assert {"attn_implementation"} <= taken and "dtype" in {
        name.id for name in ast.walk(from_pretrained) if isinstance(name, ast.Name)
    }
    mapping = ast.parse((LIBRARY / "peft" / "mapping_func.py").read_text(encoding="utf-8"))
    peft = next(
        node
        for node in mapping.body
        if isinstance(node, ast.FunctionDef) and node.name == "get_peft_model"
    )
    assert [argument.arg for argument in peft.args.args][:2] == ["model", "peft_config"]


def test_collecting_graphs_is_told_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum.neuron.utils.misc import is_precompilation

    assert not is_precompilation()
    monkeypatch.setenv("NEURON_EXTRACT_GRAPHS_ONLY", "1")
    assert is_precompilation()


@pytest.mark.parametrize("folder", ["/var/tmp/neuron-compile-cache", "/data/cache-of_2/neuron"])
def test_the_library_finds_the_compile_cache_where_the_settings_put_it(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimum.neuron.utils.cache_utils import get_neuron_cache_path

    given = environment(replace(Settings(), neuron_compile_cache_url=folder))
    monkeypatch.setenv("NEURON_CC_FLAGS", given["NEURON_CC_FLAGS"])
    assert str(get_neuron_cache_path()) == given["NEURON_COMPILE_CACHE_URL"] == folder


def pins(file: Path) -> dict[str, Requirement]:
    """The requirements of a file and of those that it names, by normal name."""
    found: dict[str, Requirement] = {}
    for line in (
        text.partition("#")[0].strip() for text in file.read_text(encoding="utf-8").splitlines()
    ):
        if line.startswith("-r "):
            found |= pins(file.parent / line[3:].strip())
        elif line and not line.startswith("-"):
            requirement = Requirement(line)
            name = requirement.name.replace("_", "-").lower()
            if name in found:  # one file pins it, another wants extras of it
                requirement.extras |= found[name].extras
                requirement.specifier &= found[name].specifier
            found[name] = requirement
    return found


def test_the_image_is_pinned_to_what_optimum_neuron_asks_for() -> None:
    image = pins(ROOT / "docker" / "requirements.txt")
    installed = importlib.metadata.version("optimum-neuron")
    assert str(image["optimum-neuron"].specifier) == f"=={installed}"
    asked = [Requirement(text) for text in importlib.metadata.requires("optimum-neuron") or []]
    extras = image["optimum-neuron"].extras
    assert extras == {"neuronx", "training"}
    wrong = []
    for requirement in asked:
        needed = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras
        )
        pinned = image.get(requirement.name.replace("_", "-").lower())
        versions = (
            [clause.version for clause in pinned.specifier if clause.operator == "=="]
            if pinned
            else []
        )
        if needed and versions and not requirement.specifier.contains(versions[0]):
            wrong.append(
                f"{requirement.name}: {requirement.specifier} is asked for, {versions[0]} is pinned"
            )
        exact = any(
            clause.operator == "==" and not clause.version.endswith("*")
            for clause in requirement.specifier
        )
        if needed and exact and not versions and requirement.name not in NOT_USED:
            wrong.append(
                f"{requirement.name}: {requirement.specifier} is asked for, nothing is pinned"
            )
    assert wrong == []


NOT_USED = {"evaluate"}  # installed with the extra `training`, imported by none of what we call


def test_adapters_are_made_with_names_that_peft_has() -> None:
    from peft import LoraConfig

    assert {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "bias",
        "task_type",
    } <= inspect.signature(LoraConfig).parameters.keys()
