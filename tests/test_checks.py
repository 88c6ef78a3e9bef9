"""Nothing that could have been known beforehand is refused after a training: the one list of
checks, who asks it, and where every refusal of a later stage is found first."""

from __future__ import annotations

import ast
import json
from dataclasses import replace

import pytest

from stages import checks
from stages.model.fit import raw_config
from stages.run.errors import InputError
from stages.run.fingerprint import ROOT, code_of
from stages.run.setting import STAGES
from stages.run.settings import Settings
from tests.conftest import Project

DEMO = json.loads((ROOT / "data" / "demo" / "model" / "config.json").read_text())
NEURON = {"backend": "neuron", "max_length": 512, "inference_sequence_length": 512}
TORCH = {"backend": "torch", "max_length": 512, "inference_sequence_length": 512}
# Other values of settings, other values of config.json -> a part of the message.
REFUSED = [
    ({**TORCH, "prompts": "nowhere.jsonl"}, {}, "PROMPTS=nowhere.jsonl is not a file"),
    ({**TORCH, "eval_set": "nowhere.jsonl"}, {}, "EVAL_SET=nowhere.jsonl is not a file"),
    ({**TORCH, "prompt_template": "nowhere.txt"}, {}, "PROMPT_TEMPLATE=nowhere.txt cannot be read"),
    ({**TORCH, "prompt_format": "file"}, {}, "PROMPT_FORMAT=file needs PROMPT_TEMPLATE"),
    (
        {**TORCH, "prompt_format": "dolly", "chat_template": "nowhere.jinja"},
        {},
        "PROMPT_FORMAT=dolly does not read CHAT_TEMPLATE=nowhere.jinja",
    ),
    ({**TORCH, "inference_sequence_length": 4096}, {}, "INFERENCE_SEQUENCE_LENGTH=4096 is above"),
    ({**TORCH, "inference_sequence_length": 4}, {}, "too short"),
    ({**TORCH, "max_length": 4096}, {}, "MAX_LENGTH=4096 is above"),
    (TORCH, {"rope_scaling": {"rope_type": "dynamic"}}, 'RoPE is of type "dynamic"'),
    (TORCH, {"rope_scaling": {"type": "longrope"}}, 'RoPE is of type "longrope"'),
    (TORCH, {"model_type": "gpt2"}, "is a gpt2, which the torch backend does not train"),
    (TORCH, {"model_type": "qwen3_moe"}, "nearest to it is qwen3 (BACKEND=neuron or torch)"),
    (TORCH, {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "softcapping=50.0"),
    ({**TORCH, "tensor_parallel_size": 2}, {"model_type": "phi3"}, "phi3 cannot be divided"),
    ({**TORCH, "lora_r": 8, "lora_target_modules": "q c_attn"}, {}, "names q, c_attn. Set it to"),
    ({**TORCH, "lora_r": 1, "tensor_parallel_size": 2}, {}, "LORA_R=1 is below TENSOR_PARALLEL"),
    ({**TORCH, "zero_1": False}, {}, "ZERO_1=0"),
    ({**TORCH, "pipeline_parallel_size": 2}, {}, "PIPELINE_PARALLEL_SIZE=2"),
    ({**TORCH, "tensor_parallel_size": 3}, {}, "TENSOR_PARALLEL_SIZE=3 does not divide"),
    ({**TORCH, "device": "neuron", "quantize": "int8"}, {}, "QUANTIZE=int8 is for a CPU or a GPU"),
    ({**NEURON, "quantize": "int8"}, {}, "QUANTIZE=int8 is for a CPU or a GPU"),
    ({**NEURON, "bf16": False}, {}, "BF16=0"),
    ({**NEURON, "torch_compile": True}, {}, "TORCH_COMPILE=1"),
    ({**NEURON, "rehearse": True, "lora_r": 4}, {}, "LORA_R=4 cannot be rehearsed here"),
    (
        {**NEURON, "rehearse": True, "nproc_per_node": 2, "pipeline_parallel_size": 2},
        {},
        "PIPELINE_PARALLEL_SIZE=2 cannot be rehearsed",
    ),
    ({**NEURON, "resume": "weights", "lora_r": 8}, {}, "RESUME=weights: LORA_R=8"),
    (NEURON, {"model_type": "mistral"}, "is a mistral, which the neuron backend does not train"),
    (
        {**NEURON, "max_length": 256},
        {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 128},
        "MAX_LENGTH=256 is above the model's sliding window of 128",
    ),
    (NEURON, {"rope_scaling": {"rope_type": "dynamic"}}, 'RoPE is of type "dynamic"'),
    ({**NEURON, "inference_tensor_parallel_size": 3}, {}, "INFERENCE_TENSOR_PARALLEL_SIZE=3 does"),
]


@pytest.mark.parametrize(("settings", "config", "words"), REFUSED)
def test_what_a_stage_would_refuse_is_known_from_settings_config_and_prompts(
    settings: dict, config: dict, words: str
) -> None:
    model = raw_config({**DEMO, **config})
    found = checks.problems(Settings(**settings), model, STAGES)
    assert [problem for problem in found if words in problem], found


def test_int8_on_neuron_is_refused_before_config_json_is_here() -> None:
    settings = Settings(backend="neuron", quantize="int8")
    assert "QUANTIZE=none" in checks.problems(settings, None, {"compile-inference"})[0]
    assert checks.problems(settings, None, {"train"}) == []


def test_only_the_stages_that_will_run_are_checked() -> None:
    settings = Settings(**TORCH, prompts="nowhere.jsonl", zero_1=False)
    config = raw_config({**DEMO, "rope_scaling": {"rope_type": "dynamic"}})
    counts = {stage: len(checks.problems(settings, config, {stage})) for stage in STAGES}
    assert counts == {
        **{"data": 0, "precompile": 1, "train": 1},
        **{"consolidate": 0, "compile-inference": 1, "eval": 1},
    }


def test_a_config_that_lacks_a_value_is_left_to_the_stage_that_reads_the_model() -> None:
    assert checks.problems(Settings(**TORCH), raw_config({"model_type": "llama"}), STAGES) == []


def test_a_stage_refuses_what_a_later_stage_would_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = Settings(**TORCH, prompts="nowhere.jsonl")
    for stage in STAGES:
        with pytest.raises(InputError, match=r"nowhere\.jsonl"):
            checks.require(settings, stage)
    checks.require(replace(settings, prompts="data/demo/prompts.jsonl"), "data")


@pytest.mark.slow
def test_make_and_doctor_say_it_all_before_anything_runs(project: Project) -> None:
    wrong = ("RECIPE=tiny", "INFERENCE_SEQUENCE_LENGTH=4096", "PROMPTS=nowhere.jsonl", "ZERO_1=0")
    words = ("INFERENCE_SEQUENCE_LENGTH=4096 is above", "PROMPTS=nowhere.jsonl", "ZERO_1=0")
    done = project.make("all", *wrong, check=False)
    assert done.returncode == 2 and "data:" not in done.stdout
    assert all(f"error: {word}" in done.stderr for word in words), done.stderr
    shown = project.make("status", *wrong)
    assert "to run" in shown.stdout
    assert all(f"would be refused: {word}" in shown.stderr for word in words)
    doctor = project.make("doctor", *wrong, check=False)
    assert doctor.returncode != 0
    assert all(word.removeprefix("PROMPTS=") in doctor.stdout for word in words), doctor.stdout


LIST = "the list of checks, before anything runs"
DATA = "data, which has the tokenizer and the dataset"
PRECOMPILE = "precompile, which reads the base model first; make doctor reads its config.json"
TRAIN = "train, before its processes start: what an interrupted training left"
OUTPUT = "nobody: an output of an earlier stage was changed by hand, or another machine made it"
MACHINE = (
    "make doctor, and precompile where it is about training: only torch or AWS's packages know"
)
# Module and function of each InputError that a stage after data can raise -> who finds it first.
FIRST_FOUND = {
    "backends/decoding Decoder.generate": DATA,
    "backends/device device_of": MACHINE,
    "backends/neuron/compile_inference _refuse_unfit": LIST,
    "backends/neuron/compiled read_description": OUTPUT,
    "backends/neuron/compiled this_runtime": MACHINE,
    "backends/neuron/generate load": OUTPUT,
    "backends/neuron/hardware _core_ids": LIST,
    "backends/neuron/hardware _limited": LIST,
    "backends/neuron/resume choose_start": TRAIN,
    "backends/neuron/train prepare": LIST,
    "backends/torch/compile_inference _checked_config": LIST,
    "backends/torch/compile_inference _load_model": OUTPUT,
    "backends/torch/generate _constants_of": OUTPUT,
    "backends/torch/generate _read_weights": OUTPUT,
    "backends/torch/generate _refuse_other_code": OUTPUT,
    "backends/torch/generate _refuse_other_machine": OUTPUT,
    "backends/torch/generate load": OUTPUT,
    "backends/torch/train prepare": MACHINE,
    "model/base _from_pickles": PRECOMPILE,
    "model/base _fetched": PRECOMPILE,
    "model/base base_config": PRECOMPILE,
    "model/base base_model_folder": PRECOMPILE,
    "model/size _parameters": PRECOMPILE,
    "run/sizes parse_duration": LIST,
    "run/sizes parse_size": LIST,
}


def refusals(path: str) -> set[str]:
    """`module function` of each place in a module that makes an InputError."""
    found = set()

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{name}.{child.name}".lstrip(".")
            if isinstance(child, ast.Call) and getattr(child.func, "id", "") in NAMES:
                found.add(f"{path.removeprefix('stages/').removesuffix('.py')} {name}")
            visit(child, inner)

    visit(ast.parse((ROOT / path).read_text()), "")
    return found


NAMES = ("InputError", "refuse")


def test_every_refusal_after_data_has_a_check_that_finds_it_first_or_a_reason() -> None:
    later = {
        path
        for stage in STAGES[1:]
        for backend in ("torch", "neuron")
        for path in code_of(stage, backend)
    } - set(code_of("data", "torch"))
    found = {place for path in later for place in refusals(path)}
    assert found == set(FIRST_FOUND)
