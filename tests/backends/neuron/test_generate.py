"""Answers of a model compiled for NeuronCores: optimum-neuron's real graphs and loader on a CPU,
compared with transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from stages.backends.neuron.compiled import Runtime, missing_files, problems_on
from stages.backends.neuron.generate import load
from stages.run.errors import InputError
from tests.fakes.neuron_compile import LENGTH, VOCAB, compile_on_cpu, python_with_fakes, save_llama

pytest.importorskip("optimum.neuron", reason="optimum-neuron has no release for this Python")

BATCH, EOS = 3, 2
PROMPTS = [[5, 17, 90, 3, 44], [9], [101, 9, 9, 64, 23, 11, 76, 30, 55, 81, 12, 6]]
LONG = [(13 * position) % VOCAB for position in range(LENGTH - 4)]
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "seed": 0,
    "eos_token_id": -1,
}
SAMPLED: dict[str, Any] = {**GREEDY, "do_sample": True, "top_k": 50, "top_p": 0.95}

# Every call that the tests look at; they are made in one process, by one loaded model.
CALLS: dict[str, dict[str, Any]] = {
    "mixed lengths": {**GREEDY, "prompts": PROMPTS, "max_new_tokens": 20, "eos_token_id": EOS},
    "one prompt": {**GREEDY, "prompts": [PROMPTS[1]], "max_new_tokens": 10},
    "two tokens": {**GREEDY, "prompts": [[9, 4], PROMPTS[0]], "max_new_tokens": 10},
    "endless": {**GREEDY, "prompts": PROMPTS, "max_new_tokens": 12},
    "full": {**GREEDY, "prompts": [[9] * (LENGTH - 3), [7]], "max_new_tokens": 8},
    "last position": {**GREEDY, "prompts": [LONG], "max_new_tokens": 9},
    "sample 1": {**SAMPLED, "prompts": PROMPTS, "max_new_tokens": 15, "seed": 1},
    "sample 1 again": {**SAMPLED, "prompts": PROMPTS, "max_new_tokens": 15, "seed": 1},
    "sample 2": {**SAMPLED, "prompts": PROMPTS, "max_new_tokens": 15, "seed": 2},
    "sample 1 alone": {**SAMPLED, "prompts": PROMPTS[:1], "max_new_tokens": 15, "seed": 1},
    "sample of all ids": {
        **SAMPLED,
        "prompts": PROMPTS[:1],
        "max_new_tokens": 15,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 5.0,
    },
    "left early": {**GREEDY, "prompts": PROMPTS, "max_new_tokens": 12, "steps_taken": 2},
    "after leaving": {**GREEDY, "prompts": PROMPTS, "max_new_tokens": 12},
    "side by side": {**GREEDY, "side_by_side": [PROMPTS, PROMPTS[::-1]], "max_new_tokens": 6},
    "upstream": {"upstream": PROMPTS[0], "max_new_tokens": 20, "eos_token_id": EOS},
    "too long": {**GREEDY, "prompts": [[7], [9] * LENGTH], "max_new_tokens": 3},
    "too many": {**GREEDY, "prompts": [[7]] * (BATCH + 1), "max_new_tokens": 3},
    "empty": {**GREEDY, "prompts": [[7], []], "max_new_tokens": 3},
    "unknown id": {**GREEDY, "prompts": [[7, VOCAB]], "max_new_tokens": 3},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), torch.float32)


@pytest.fixture(scope="module")
def compiled(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_on_cpu(model_dir, tmp_path_factory.mktemp("compiled") / "folder", BATCH)


@pytest.fixture(scope="module")
def results(compiled: Path) -> dict[str, Any]:
    return dict(zip(CALLS, answers_of(compiled, list(CALLS.values())), strict=True))


def answers_of(folder: Path, calls: list[dict[str, Any]]) -> list[Any]:
    done = python_with_fakes(
        "-m", "tests.fakes.neuron_answer", str(folder), standard_input=json.dumps(calls)
    )
    return json.loads(done.stdout.splitlines()[-1])


def by_prompt(steps: list[list[int | None]]) -> list[list[int]]:
    """What was streamed, gathered per prompt."""
    return [[new for new in row if new is not None] for row in zip(*steps, strict=True)]


def answer_of_transformers(
    model_dir: Path, prompt: list[int], max_new_tokens: int, eos: int = -1
) -> list[int]:
    ids = torch.tensor([prompt])
    generated = (
        LlamaForCausalLM.from_pretrained(model_dir)
        .generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
        )[0, len(prompt) :]
        .tolist()
    )
    return generated[: generated.index(eos)] if eos in generated else generated


def test_greedy_answers_to_prompts_of_different_lengths_in_one_batch_equal_those_of_transformers(
    results, model_dir
):
    assert by_prompt(results["mixed lengths"]) == [
        answer_of_transformers(model_dir, prompt, 20, EOS) for prompt in PROMPTS
    ]


def test_a_prompt_of_one_token_alone_in_the_batch_is_answered_as_transformers_answers_it(
    results, model_dir
):
    assert by_prompt(results["one prompt"]) == [answer_of_transformers(model_dir, PROMPTS[1], 10)]


def test_a_prompt_of_two_tokens_beside_a_longer_one_is_answered_as_transformers_answers_it(
    results, model_dir
):
    assert by_prompt(results["two tokens"]) == [
        answer_of_transformers(model_dir, prompt, 10) for prompt in ([9, 4], PROMPTS[0])
    ]


def test_the_last_position_of_the_compiled_length_is_answered_as_transformers_answers_it(
    results, model_dir
):
    assert by_prompt(results["last position"]) == [answer_of_transformers(model_dir, LONG, 4)]


def test_the_answer_is_that_of_optimum_neurons_own_loop(results):
    assert by_prompt(results["mixed lengths"])[0] == [
        new for new in results["upstream"] if new != EOS
    ]


def test_a_model_compiled_for_one_prompt_answers_as_transformers_does(model_dir, tmp_path):
    folder = compile_on_cpu(model_dir, tmp_path / "one at a time", 1)
    steps = answers_of(
        folder, [{**GREEDY, "prompts": [prompt], "max_new_tokens": 12} for prompt in PROMPTS]
    )
    assert [by_prompt(answer)[0] for answer in steps] == [
        answer_of_transformers(model_dir, prompt, 12) for prompt in PROMPTS
    ]


def test_an_answer_stops_at_eos_which_is_not_yielded_while_the_others_go_on(results, compiled):
    whole = by_prompt(results["endless"])
    eos = next(new for new in whole[0][2:] if new not in whole[0][:2] and new not in whole[1])
    (steps,) = answers_of(
        compiled, [{**GREEDY, "prompts": PROMPTS, "max_new_tokens": 12, "eos_token_id": eos}]
    )
    assert by_prompt(steps)[:2] == [whole[0][: whole[0].index(eos)], whole[1]]


def test_a_prompt_that_fills_the_compiled_length_ends_while_a_shorter_one_goes_on(results):
    assert [[new is not None for new in step] for step in results["full"]] == [[True, True]] * 3 + [
        [False, True]
    ] * 5


def test_the_same_seed_gives_the_same_sample_and_another_seed_another(results):
    assert results["sample 1"] == results["sample 1 again"] != results["sample 2"]


def test_a_sample_does_not_depend_on_the_prompts_beside_it(results):
    assert by_prompt(results["sample 1"])[0] == by_prompt(results["sample 1 alone"])[0]


def test_all_ids_can_be_sampled_from(results, model_dir):
    answer = by_prompt(results["sample of all ids"])[0]
    assert len(answer) == 15 and answer != answer_of_transformers(model_dir, PROMPTS[0], 15)


def test_the_first_ids_come_before_the_answer_is_finished_and_a_consumer_may_leave(results):
    assert results["left early"] == results["endless"][:2]
    assert results["after leaving"] == results["endless"]


def test_two_answers_at_once_are_refused_instead_of_mixed(results):
    assert "one KV cache" in results["side by side"]


@pytest.mark.parametrize(
    ("call", "numbers"),
    [
        ("too long", [f"Prompt 2 of 2 has {LENGTH} tokens", f"at most {LENGTH - 1}"]),
        ("too many", [f"{BATCH + 1} prompts", f"1 to {BATCH}"]),
        ("empty", ["Prompt 2 of 2 has no tokens"]),
        ("unknown id", [f"ids from 7 to {VOCAB}", f"0 to {VOCAB - 1}"]),
    ],
)
def test_prompts_that_do_not_fit_are_refused_with_both_numbers(results, call, numbers):
    assert all(number in results[call] for number in numbers)


def test_all_that_keeps_a_compiled_model_from_running_here_is_reported_before_loading(
    compiled, tmp_path
):
    folder = Path(shutil.copytree(compiled, tmp_path / "copy"))
    description = json.loads((folder / "neuron_config.json").read_text())
    made_by = {
        "optimum_neuron_version": "0.4.4",
        "neuronxcc_version": "2.20.1.0",
        "target": "trn2",
        "tp_degree": 4,
    }
    (folder / "neuron_config.json").write_text(json.dumps({**description, **made_by}))
    (refusal,) = answers_of(folder, [])
    for words in (
        "optimum-neuron 0.4.4, this is optimum-neuron 0.4.5",
        "neuronx-cc 2.20.1.0, this is neuronx-cc 2.21.33363.0+stand.in",
        "compiled for trn2, this machine is a trn1",
        "runs on 4 NeuronCores (INFERENCE_TENSOR_PARALLEL_SIZE), this machine has 2",
        "lacks checkpoint/weights/tp1_sharded_checkpoint.safetensors",
        "make compile-inference",
    ):
        assert words in refusal


def test_a_model_without_its_weights_is_refused_rather_than_looked_for_on_the_hub(
    compiled, tmp_path
):
    folder = Path(shutil.copytree(compiled, tmp_path / "copy"))
    (folder / "checkpoint/weights/tp0_sharded_checkpoint.safetensors").unlink()
    (refusal,) = answers_of(folder, [])
    assert "lacks checkpoint/weights/tp0_sharded_checkpoint.safetensors" in refusal


def test_the_files_of_a_compiled_model_are_those_that_the_export_writes(compiled):
    assert missing_files(compiled, 1) == []


def test_a_machine_without_devices_is_named_as_such():
    machine = Runtime("0.4.5", "2.21", None, 0)
    compiled_here = {
        "optimum_neuron_version": "0.4.5",
        "neuronxcc_version": "2.21",
        "target": "trn1",
        "tp_degree": 2,
    }
    assert list(problems_on(machine, compiled_here)) == [
        "it was compiled for trn1, and there is no Neuron device here"
    ]
    assert list(problems_on(Runtime("0.4.5", "2.21", "trn1", 2), compiled_here)) == []


def test_a_folder_that_holds_no_compiled_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"neuron_config.json is missing.*make compile-inference"):
        load(tmp_path)


def test_where_the_neuron_packages_are_missing_the_refusal_names_them(compiled):
    with pytest.raises(InputError, match=r"not installed: .*neuronxcc.*container"):
        load(compiled)
