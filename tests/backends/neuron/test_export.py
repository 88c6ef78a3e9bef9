"""Compiling for NeuronCores: the whole stage's work over optimum-neuron's real export, its
refusals, and the names it relies on."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.backends.neuron import compiled
from stages.backends.neuron.check import TARGETS
from stages.backends.neuron.compile_inference import compile_model, environment
from stages.model.fit import ARCHITECTURES
from stages.run.errors import InputError, StageFailure
from stages.run.layout import CONFIG_FILE
from stages.run.settings import Settings
from tests.fakes.neuron_compile import FAKES, LENGTH, save_llama

OPTIMUM = pytest.importorskip(
    "optimum.neuron", reason="optimum-neuron has no release for this Python"
)
SOURCE = Path(OPTIMUM.__path__[0])
INFERENCE = "models/inference/backend"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "model", torch.bfloat16)


@pytest.fixture
def with_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fakes for AWS's wheels, to be found here and imported in the process that compiles;
    scratch space in tmp_path."""
    monkeypatch.syspath_prepend(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.chdir(tmp_path)


def settings(**given: Any) -> Settings:
    return Settings(
        **{
            "backend": "neuron",
            "inference_batch_size": 2,
            "inference_sequence_length": LENGTH,
            **given,
        }
    )


def refusal(model_dir: Path, output: Path, **given: Any) -> list[str]:
    with pytest.raises(InputError) as error:
        compile_model(model_dir, output, settings=settings(**given))
    assert not output.exists()
    return error.value.problems


@pytest.mark.usefixtures("with_compiler")
def test_compiling_leaves_a_whole_model_without_a_path_of_this_machine_and_tells_what_it_is(
    model_dir, tmp_path
):
    output = tmp_path / "compiled"
    facts = compile_model(model_dir, output, settings=settings(instance_type="inf2"))
    assert compiled.missing_files(output, 1) == []
    texts = [path.read_text() for path in output.rglob("*.json")]
    assert len(texts) == 2 and not any(str(tmp_path) in text for text in texts)
    sizes = {
        "batch_size": 2,
        "sequence_length": LENGTH,
        "tensor_parallel_size": 1,
        "dtype": "bfloat16",
    }
    versions = {"optimum_neuron": "0.4.5", "neuronx_cc": "2.21.33363.0+stand.in"}
    expected = {"device": "inf2", "target": "trn1", **sizes, **versions}
    assert {name: facts[name] for name in expected} == expected
    assert facts["weight_bytes"] == (output / compiled.weight_files(1)[0]).stat().st_size > 0
    assert facts["package_bytes"] > 0 and facts["compile_seconds"] > 0


@pytest.mark.usefixtures("with_compiler")
def test_nothing_but_the_compiled_model_is_left_in_the_folder_and_the_scratch_space_is_emptied(
    model_dir, tmp_path
):
    output = tmp_path / "compiled"
    compile_model(model_dir, output, settings=settings())
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert found == {
        CONFIG_FILE,
        compiled.NEURON_CONFIG,
        compiled.PROGRAM,
        *compiled.weight_files(1),
    }
    assert not (tmp_path / "outputs/.cache/compiler/graphs").exists()


@pytest.mark.usefixtures("with_compiler")
def test_a_model_for_trn2_is_compiled_for_its_own_target_with_two_physical_cores_to_a_logical_one(
    model_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("FAKE_COMPILER_FAILS", "stopped to look at the flags")
    with pytest.raises(StageFailure):
        compile_model(model_dir, tmp_path / "compiled", settings=settings(instance_type="trn2"))
    flags = (
        tmp_path / "outputs/.cache/compiler/graphs/context_encoding/log-neuron-cc.txt"
    ).read_text()
    assert "--target trn2" in flags and "--lnc=2" in flags and flags.endswith("for trn2")


@pytest.mark.usefixtures("with_compiler")
def test_a_compiler_that_fails_is_quoted_and_its_logs_are_kept(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_COMPILER_FAILS", "neuronx-cc ended with -9")
    with pytest.raises(
        StageFailure,
        match=r"(?s)RuntimeError: neuronx-cc ended with -9.*logs are in "
        r".*graphs.*INFERENCE_SEQUENCE_LENGTH",
    ):
        compile_model(model_dir, tmp_path / "compiled", settings=settings())
    assert (
        tmp_path / "outputs/.cache/compiler/graphs/token_generation/log-neuron-cc.txt"
    ).is_file()


@pytest.mark.usefixtures("with_compiler")
def test_the_callers_own_target_and_compile_folder_do_not_reach_the_compiler(
    model_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
    monkeypatch.setenv("BASE_COMPILE_WORK_DIR", str(tmp_path / "elsewhere"))
    assert compile_model(model_dir, tmp_path / "compiled", settings=settings())["target"] == "trn1"
    assert not (tmp_path / "elsewhere").exists()


def test_the_compilers_path_and_cache_are_the_same_for_every_run_and_all_weights(
    tmp_path,
):
    given = environment(settings(neuron_compile_cache_url="s3://bucket/graphs"), tmp_path)
    assert given["BASE_COMPILE_WORK_DIR"] == f"{tmp_path}/graphs/"
    assert given["NEURON_COMPILE_CACHE_URL"] == "s3://bucket/graphs"


def test_the_hub_is_asked_for_graphs_only_where_a_repository_is_named(tmp_path):
    assert environment(settings(), tmp_path)["HF_HUB_OFFLINE"] == "1"
    named = environment(settings(custom_cache_repo="me/graphs"), tmp_path)
    assert named["CUSTOM_CACHE_REPO"] == "me/graphs" and "HF_HUB_OFFLINE" not in named


@pytest.mark.usefixtures("with_compiler")
def test_everything_that_cannot_be_compiled_is_refused_together(model_dir, tmp_path):
    config = json.loads((model_dir / "config.json").read_text())
    config.update(model_type="mamba", dtype="float32", max_position_embeddings=32, vocab_size=127)
    config.update(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    (model_dir / "config.json").write_text(json.dumps(config))
    problems = refusal(
        model_dir, tmp_path / "compiled", inference_tensor_parallel_size=48, instance_type="trn1n"
    )
    expected = [
        "is a mamba, which the neuron backend does not train or compile",
        'RoPE is of type "dynamic"',
        f"INFERENCE_SEQUENCE_LENGTH={LENGTH} is above the model's 32 positions",
        "INFERENCE_TENSOR_PARALLEL_SIZE=48 is above the 32 NeuronCores of the largest trn1n",
        "INFERENCE_TENSOR_PARALLEL_SIZE=48 does not divide the model's 127 vocabulary entries",
        "dtype float32; the neuron backend compiles bfloat16. Set BF16=1",
    ]
    assert len(problems) == len(expected) and all(
        words in problem for words, problem in zip(expected, problems, strict=True)
    )


@pytest.mark.usefixtures("with_compiler")
def test_heads_of_another_width_are_refused_for_llama_and_compiled_for_qwen3(model_dir, tmp_path):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "head_dim": 8}))
    assert "4 heads of 8 are not its hidden size 64" in refusal(model_dir, tmp_path / "compiled")[0]
    (model_dir / "config.json").write_text(
        json.dumps({**config, "head_dim": 8, "model_type": "qwen3", "dtype": "float16"})
    )
    assert [
        problem.partition(" says ")[2][:13] for problem in refusal(model_dir, tmp_path / "compiled")
    ] == ["dtype float16"]


@pytest.mark.usefixtures("with_compiler")
def test_a_project_in_a_path_with_a_space_is_refused(model_dir, tmp_path, monkeypatch):
    (tmp_path / "my project").mkdir()
    monkeypatch.chdir(tmp_path / "my project")
    assert "split at ' '" in refusal(model_dir, tmp_path / "compiled")[0]


def test_a_machine_without_the_compiler_is_told_what_is_missing_and_that_no_device_is_needed(
    model_dir, tmp_path
):
    (problem,) = refusal(model_dir, tmp_path / "compiled")
    assert (
        all(name in problem for name in compiled.PACKAGES)
        and "docker" in problem
        and "no device" in problem
    )


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert "Run `make consolidate` first" in refusal(tmp_path, tmp_path / "compiled")[0]


# What is relied on in optimum-neuron, one test a name: a release that changes it fails by that
# name.


def imported(module: str) -> Any:
    return importlib.import_module(f"optimum.neuron.{module}")


def parameters(of: str) -> set[str]:
    """The parameters of `module:Class.method` of optimum.neuron, imported."""
    module, _, path = of.partition(":")
    found: Any = imported(module)
    for name in path.split("."):
        found = getattr(found, name)
    return set(inspect.signature(found).parameters)


def tree_of(path: str) -> ast.Module:
    return ast.parse((SOURCE / path).read_text(encoding="utf-8"))


def parameters_in_source(path: str, name: str) -> set[str]:
    """The same of a function in a file that cannot be imported without AWS's wheels."""
    function = next(
        node
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    return {argument.arg for argument in function.args.args}


def strings(path: str) -> set[str]:
    return {
        node.value
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def registered_models() -> set[str]:
    calls = [
        node
        for node in ast.walk(tree_of("models/inference/auto_models.py"))
        if isinstance(node, ast.Call)
    ]
    constants = [
        [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
        for call in calls
    ]
    return {
        first
        for first, *rest in (found for found in constants if found)
        if "text-generation" in rest
    }


MODEL = "models.inference.modeling_utils:NeuronModelForCausalLM"
SIZES = {"instance_type", "batch_size", "sequence_length", "tensor_parallel_size"}
CONTRACT: dict[str, Callable[[], bool]] = {
    "get_neuron_config": lambda: (
        parameters(f"{MODEL}.get_neuron_config") >= {"model_name_or_path", "config", *SIZES}
    ),
    "export": lambda: (
        parameters(f"{MODEL}.export") >= {"model_id", "neuron_config", "config", "load_weights"}
    ),
    "save_pretrained": lambda: "save_directory" in parameters(f"{MODEL}.save_pretrained"),
    "from_pretrained": lambda: "model_id" in parameters(f"{MODEL}.from_pretrained"),
    "forward": lambda: (
        parameters_in_source(
            f"{INFERENCE}/modules/decoder/modeling_decoder.py", "get_required_kwargs"
        )
        == {"self"}
        and {"input_ids", "position_ids", "seq_ids", "sampling_params"}
        <= parameters_in_source(f"{INFERENCE}/modules/decoder/decoder_wrappers.py", "_forward")
    ),
    "on_device_sampling": lambda: (
        parameters("models.inference.backend.config:NxDNeuronConfig")
        >= {"on_device_sampling", "max_context_length", "tp_degree", "target"}
    ),
    "neuron_config.json": lambda: (
        imported("configuration_utils").NEURON_CONFIG_NAME == compiled.NEURON_CONFIG
    ),
    "versions in neuron_config.json": lambda: (
        {"optimum_neuron_version", "neuronxcc_version"} <= strings("configuration_utils.py")
    ),
    "model.pt and checkpoint": lambda: (
        {compiled.PROGRAM, "checkpoint", "weights"} <= strings(f"{INFERENCE}/pretrained_model.py")
    ),
    "BASE_COMPILE_WORK_DIR": lambda: (
        "BASE_COMPILE_WORK_DIR" in strings(f"{INFERENCE}/pretrained_model.py")
    ),
    "NEURON_PLATFORM_TARGET_OVERRIDE": lambda: (
        "NEURON_PLATFORM_TARGET_OVERRIDE" in strings("utils/instance.py")
    ),
    "instance types": lambda: (
        {name: target for name, (target, _) in TARGETS.items()}
        == imported("utils.instance").INSTANCE_VALUE_MAP
    ),
    "get_available_cores": lambda: not parameters("utils.system:get_available_cores"),
    "current_instance_type": lambda: not parameters("utils.instance:current_instance_type"),
    "get_neuronxcc_version": lambda: not parameters("utils.version_utils:get_neuronxcc_version"),
    "supported models": lambda: set(ARCHITECTURES["neuron"]) <= registered_models(),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_optimum_neuron_still_has(name: str) -> None:
    assert CONTRACT[name]()
