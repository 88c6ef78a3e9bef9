"""Compiled inference of the torch backend, on a tiny random Llama that is compiled once for all
tests."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from stages.backends.torch import compile_inference, generate, package_cache
from stages.backends.torch.check_compiled import (
    CHECKED_STEPS,
    check_compiled,
    eager_logits,
    random_probe,
)
from stages.backends.torch.generate import CompiledModel, load
from stages.run.errors import InputError, StageFailure
from stages.run.fingerprint import ROOT
from stages.run.settings import Settings
from tests.tiny_llama import tiny_llama

BATCH, LENGTH, VOCAB, EOS = 3, 48, 128, 2
PROMPTS = [[5, 17, 90, 3, 44], [7], [101, 9, 9, 64, 23, 11, 76, 30, 55, 81, 12, 6]]
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "seed": 0,
}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.95}


def sizes(batch_size: int, sequence_length: int) -> Settings:
    return Settings(inference_batch_size=batch_size, inference_sequence_length=sequence_length)


def llama() -> LlamaForCausalLM:
    """Its weights are wide enough that greedy answers are not one id repeated."""
    return tiny_llama(
        vocab_size=VOCAB, hidden_size=64, tie_word_embeddings=True, initializer_range=0.2
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    (folder / "prompt.json").write_text(
        '{"format": "text", "template": "{instruction}{response}"}', encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def facts_and_folder(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("compiled")
    return compile_inference.compile_model(model_dir, folder, settings=sizes(BATCH, LENGTH)), folder


@pytest.fixture(scope="module")
def compiled(facts_and_folder: tuple[dict[str, Any], Path]) -> Path:
    return facts_and_folder[1]


@pytest.fixture(scope="module")
def model(compiled: Path) -> CompiledModel:
    return load(compiled)


@pytest.fixture
def copy(compiled: Path, tmp_path: Path) -> Path:
    """A compiled model that a test may spoil."""
    return Path(shutil.copytree(compiled, tmp_path / "copy"))


def answers(steps: Iterator[list[int | None]], prompts: int) -> list[list[int]]:
    """What was streamed, gathered per prompt."""
    gathered: list[list[int]] = [[] for _ in range(prompts)]
    for step in steps:
        for row, new in enumerate(step):
            if new is not None:
                gathered[row].append(new)
    return gathered


def answer_of_transformers(
    model_dir: Path, prompt: list[int], max_new_tokens: int, eos: int
) -> list[int]:
    model = LlamaForCausalLM.from_pretrained(model_dir)
    ids = torch.tensor([prompt])
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return generated[: generated.index(eos)] if eos in generated else generated


def test_greedy_answers_to_prompts_of_different_lengths_in_one_batch_equal_those_of_transformers(
    model, model_dir
):
    expected = [answer_of_transformers(model_dir, prompt, 20, EOS) for prompt in PROMPTS]
    assert (
        answers(
            model.generate(PROMPTS, max_new_tokens=20, eos_token_id=EOS, **GREEDY), len(PROMPTS)
        )
        == expected
    )


def test_an_answer_has_the_log_probability_that_transformers_gives_it_and_its_end(model, model_dir):
    whole = LlamaForCausalLM.from_pretrained(model_dir)
    for how in (GREEDY, {**SAMPLED, "seed": 5}):
        asked = model.generate(PROMPTS, max_new_tokens=6, eos_token_id=-1, **how)
        three = answers(asked, 3)
        for prompt, ids, nats in zip(PROMPTS, three, asked.log_probabilities, strict=True):
            [logits] = whole(torch.tensor([prompt + ids])).logits.detach().log_softmax(-1)
            expected = sum(float(logits[len(prompt) + n - 1, id]) for n, id in enumerate(ids))
            assert nats == pytest.approx(expected, abs=1e-3)
    # An answer that the model ends at once has the log-probability of that end.
    asked = model.generate(
        [[7]],
        max_new_tokens=5,
        eos_token_id=answers(model.generate([[7]], max_new_tokens=1, eos_token_id=-1, **GREEDY), 1)[
            0
        ][0],
        **GREEDY,
    )
    assert list(asked) == [] and asked.log_probabilities[0] < 0


def test_a_prompt_of_one_token_alone_in_the_batch_is_answered_as_transformers_answers_it(
    model, model_dir
):
    expected = answer_of_transformers(model_dir, [7], 10, EOS)
    assert answers(model.generate([[7]], max_new_tokens=10, eos_token_id=EOS, **GREEDY), 1) == [
        expected
    ]


def test_an_answer_stops_at_eos_which_is_not_yielded_while_the_others_go_on(model):
    whole = answers(model.generate(PROMPTS, max_new_tokens=12, eos_token_id=-1, **GREEDY), 3)
    eos = next(new for new in whole[0][2:] if new not in whole[0][:2] and new not in whole[1])
    stopped = answers(model.generate(PROMPTS, max_new_tokens=12, eos_token_id=eos, **GREEDY), 3)
    assert (stopped[0], stopped[1]) == (whole[0][: whole[0].index(eos)], whole[1])


def test_generation_ends_when_every_prompt_has_ended(model):
    first = next(model.generate([[7]], max_new_tokens=5, eos_token_id=-1, **GREEDY))[0]
    assert list(model.generate([[7]], max_new_tokens=5, eos_token_id=first, **GREEDY)) == []


def test_a_prompt_that_fills_the_compiled_length_ends_while_a_shorter_one_goes_on(model):
    steps = list(
        model.generate([[9] * (LENGTH - 3), [7]], max_new_tokens=8, eos_token_id=-1, **GREEDY)
    )
    assert [[new is not None for new in step] for step in steps] == [[True, True]] * 3 + [
        [False, True]
    ] * 5


def test_the_last_position_of_the_compiled_length_is_answered_as_transformers_answers_it(
    model, model_dir
):
    prompt = [(13 * position) % VOCAB for position in range(LENGTH - 4)]
    expected = answer_of_transformers(model_dir, prompt, 4, -1)
    assert answers(model.generate([prompt], max_new_tokens=9, eos_token_id=-1, **GREEDY), 1) == [
        expected
    ]


def test_the_same_seed_gives_the_same_sample_and_another_seed_another(model):
    def drawn(seed: int) -> list[list[int]]:
        return answers(
            model.generate(PROMPTS, max_new_tokens=15, eos_token_id=-1, seed=seed, **SAMPLED), 3
        )

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_sample_does_not_depend_on_the_prompts_beside_it(model):
    alone = answers(
        model.generate(PROMPTS[:1], max_new_tokens=15, eos_token_id=-1, seed=3, **SAMPLED), 1
    )
    beside = answers(
        model.generate(PROMPTS, max_new_tokens=15, eos_token_id=-1, seed=3, **SAMPLED), 3
    )
    assert beside[0] == alone[0]
    last = answers(
        model.generate(
            PROMPTS[2:], max_new_tokens=15, eos_token_id=-1, seed=3, number=2, **SAMPLED
        ),
        1,
    )
    assert beside[2] == last[0]


def test_the_same_prompt_asked_twice_gets_two_samples(model):
    first, second = answers(
        model.generate([PROMPTS[0]] * 2, max_new_tokens=15, eos_token_id=-1, seed=3, **SAMPLED), 2
    )
    assert first != second


def test_two_answers_in_progress_do_not_disturb_each_other(model):
    expected = list(model.generate(PROMPTS, max_new_tokens=6, eos_token_id=-1, **GREEDY))
    one, other = (
        model.generate(prompts, max_new_tokens=6, eos_token_id=-1, **GREEDY)
        for prompts in (PROMPTS, PROMPTS[::-1])
    )
    assert [step for step, _ in zip(one, other, strict=True)] == expected


@pytest.mark.parametrize(
    ("prompts", "numbers"),
    [
        ([[7], [9] * LENGTH], [f"Prompt 2 of 2 has {LENGTH} tokens", f"at most {LENGTH - 1}"]),
        ([[7]] * (BATCH + 1), [f"{BATCH + 1} prompts", f"1 to {BATCH}"]),
        ([[7], []], ["Prompt 2 of 2 has no tokens"]),
        ([[7, VOCAB]], [f"ids from 7 to {VOCAB}", f"0 to {VOCAB - 1}"]),
    ],
    ids=["too long", "too many", "empty", "outside the vocabulary"],
)
def test_prompts_that_do_not_fit_are_refused_at_once_with_both_numbers(model, prompts, numbers):
    with pytest.raises(InputError) as refusal:
        model.generate(prompts, max_new_tokens=3, eos_token_id=EOS, **GREEDY)
    assert all(number in str(refusal.value) for number in numbers)


def test_a_fresh_process_answers_with_neither_transformers_nor_the_compiler_imported(
    model, compiled
):
    script = f"""
import sys
sys.modules["transformers"] = None
from pathlib import Path
from stages.backends.torch.generate import load
model = load(Path({str(compiled)!r}))
steps = model.generate({PROMPTS!r}, max_new_tokens=6, eos_token_id=-1, **{GREEDY!r})
print(list(steps), "torch._inductor" in sys.modules)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    expected = list(model.generate(PROMPTS, max_new_tokens=6, eos_token_id=-1, **GREEDY))
    assert (ended.stdout.strip(), ended.stderr) == (f"{expected} False", "")


def test_torchs_public_loader_gives_the_same_answers_as_the_fast_one(model, compiled, monkeypatch):
    monkeypatch.setattr(generate, "_load_step", generate._load_step_publicly)
    steps = load(compiled).generate(PROMPTS, max_new_tokens=6, eos_token_id=-1, **GREEDY)
    assert list(steps) == list(model.generate(PROMPTS, max_new_tokens=6, eos_token_id=-1, **GREEDY))


def retyped(weights: dict[str, torch.Tensor]) -> None:
    weights["model.rotary_emb.inv_freq"] = weights["model.rotary_emb.inv_freq"].bfloat16()


def reshaped(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()


def renamed(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.scale"] = weights.pop("model.norm.weight")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (retyped, ["inv_freq", "float32 [8]", "bfloat16 [8]"]),
        (reshaped, ["model.norm.weight", "[64]", "[63]"]),
        (renamed, ["model.norm.scale", "nothing"]),
    ],
)
def test_weights_that_differ_in_dtype_shape_or_name_are_refused(
    copy, spoil: Callable[[dict[str, torch.Tensor]], None], told
):
    weights = load_file(copy / generate.WEIGHTS)
    spoil(weights)
    save_file(weights, copy / generate.WEIGHTS)
    with pytest.raises(InputError) as refusal:
        load(copy)
    assert all(part in str(refusal.value) for part in told)


def test_a_package_and_weights_that_were_not_made_together_are_refused(copy):
    """The description agrees with the weights, but neither with the packages."""
    weights = load_file(copy / generate.WEIGHTS)
    renamed(weights)
    save_file(weights, copy / generate.WEIGHTS)
    describe(
        copy,
        "constants",
        {name: generate.constant_type(tensor) for name, tensor in weights.items()},
    )
    with pytest.raises(
        InputError,
        match=r"prefill\.pt2 and weights\.safetensors do not belong .* lack model\.norm\.weight",
    ):
        load(copy)


def describe(compiled: Path, key: str, value: Any) -> None:
    description = json.loads((compiled / generate.COMPILED_INFO).read_text(encoding="utf-8"))
    (compiled / generate.COMPILED_INFO).write_text(
        json.dumps({**description, key: value}), encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        (
            "instruction_set",
            {"name": "s390x ZVECTOR", "features": ""},
            "instruction set s390x ZVECTOR, this machine has",
        ),
        ("torch", "2.4.1", f"torch 2.4.1, this is torch {torch.__version__}"),
        pytest.param(
            "device",
            "cuda",
            "it was compiled for cuda, and DEVICE=cuda: PyTorch sees no NVIDIA GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_another_machines_model_is_refused_with_both_names_and_the_remedy(copy, key, value, told):
    describe(copy, key, value)
    with pytest.raises(InputError) as refusal:
        load(copy)
    assert told in str(refusal.value)
    assert f"Remove {copy} and run `make compile-inference` on this machine" in str(refusal.value)


def test_a_model_compiled_for_instructions_that_this_machine_lacks_is_refused_by_their_names(copy):
    here = json.loads((copy / generate.COMPILED_INFO).read_text(encoding="utf-8"))[
        "instruction_set"
    ]
    describe(copy, "instruction_set", {**here, "features": f"{here['features']} avx2048"})
    with pytest.raises(InputError, match="with avx2048, which this machine's"):
        load(copy)


def test_a_folder_without_a_compiled_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no compiled model: compiled\.json is missing"):
        load(tmp_path)


def test_compiling_reports_agreement_with_the_eager_model(facts_and_folder):
    facts, _ = facts_and_folder
    assert facts["max_logits_difference"] <= 1e-4 * facts["largest_logit"]
    assert facts["greedy_ids_equal"] == facts["greedy_ids_compared"] == BATCH * (CHECKED_STEPS + 1)


def test_the_memory_of_compiling_is_the_largest_of_the_stage_and_its_processes(
    model_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(compile_inference, "run_compilers", lambda *_: [5, 7])
    monkeypatch.setattr(compile_inference, "check_compiled", lambda *_: {})
    monkeypatch.setattr(package_cache, "PACKAGES", tmp_path / "packages")
    monkeypatch.setattr(package_cache, "keep", lambda *_: None)
    for own, largest in ((6, 7), (9, 9)):
        monkeypatch.setattr(compile_inference, "peak_resident", lambda own=own: own)
        found = compile_inference.compile_model(model_dir, tmp_path, settings=sizes(1, LENGTH))
        assert found["peak_memory_bytes"] == largest and not found["packages_kept"]


def test_the_compiled_folder_holds_what_eval_needs_and_nothing_else(compiled):
    expected = {"compiled.json", "decode.pt2", "prefill.pt2", "weights.safetensors"}
    assert {path.name for path in compiled.iterdir()} == expected


@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_a_compiled_model_whose_logits_differ_is_refused(copy, value):
    probe = random_probe(vocab_size=VOCAB, batch_size=BATCH, sequence_length=LENGTH)
    expected = eager_logits(llama(), probe)
    check_compiled(copy, probe, expected)
    weights = load_file(copy / generate.WEIGHTS)
    weights["model.norm.weight"][5] = value
    save_file(weights, copy / generate.WEIGHTS)
    with pytest.raises(StageFailure, match=r"largest difference of a logit (\d|nan)"):
        check_compiled(copy, probe, expected)


@pytest.mark.parametrize(
    ("config", "sequence_length", "told"),
    [
        (
            {"model_type": "mixtral"},
            LENGTH,
            ["is a mixtral", "torch: gemma3_text, granite, llama", "nearest to it is mistral"],
        ),
        (
            {"model_type": "llama", "max_position_embeddings": 64},
            65,
            ["INFERENCE_SEQUENCE_LENGTH=65", "64 positions"],
        ),
        ({"model_type": "llama"}, 8, ["INFERENCE_SEQUENCE_LENGTH=8 tokens", "at least 16"]),
        (
            {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            LENGTH,
            ["dynamic"],
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_the_weights_are_read(
    tmp_path, config, sequence_length, told
):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError) as refusal:
        compile_inference.compile_model(
            tmp_path, tmp_path / "compiled", settings=sizes(1, sequence_length)
        )
    assert all(part in str(refusal.value) for part in told)


def test_a_missing_cpp_compiler_is_named(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="no-such-compiler is not on the PATH"):
        compile_inference.compile_model(model_dir, tmp_path, settings=sizes(1, LENGTH))


def test_a_compiler_that_fails_ends_the_stage_with_its_message(model_dir, tmp_path, monkeypatch):
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\n[ "$*" = --version ] || exit 1\necho 99\n', encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{compiler.parent}:{os.environ['PATH']}")
    with pytest.raises(StageFailure, match=r"Compiling (prefill|decode) failed"):
        compile_inference.compile_model(model_dir, tmp_path, settings=sizes(1, LENGTH))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize(("refused", "known"), [("-no-such-flag", True), ("-mavx*", None)])
def test_a_compiler_that_refuses_a_flag_of_this_cpu_is_left_to_inductors_tests(
    refused, known, tmp_path
):
    compiler = tmp_path / "g++"
    compiler.write_text(
        f'#!/bin/sh\nfor flag; do case "$flag" in {refused}) exit 1;; esac; done\nexec g++ "$@"\n',
        encoding="utf-8",
    )
    compiler.chmod(0o755)
    script = "from stages.backends.torch.inductor import compiler_knows_instructions as known\n"
    ended = subprocess.run(
        [sys.executable, "-c", f"{script}print(known())"],
        cwd=ROOT,
        env={**os.environ, "CXX": str(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.stdout, ended.stderr) == (f"{known}\n", "")


def compiled_again(model_dir: Path, output: Path, length: int = LENGTH) -> bool:
    """Compiles a model; returns whether that took the compiler."""
    found = compile_inference.compile_model(model_dir, output, settings=sizes(BATCH, length))
    return not found["packages_kept"]


def test_other_weights_of_the_same_shape_take_the_packages_and_answer_with_theirs(
    compiled, model_dir, tmp_path
):
    other = Path(shutil.copytree(model_dir, tmp_path / "other"))
    torch.manual_seed(1)
    model = llama()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(other)
    assert not compiled_again(other, tmp_path / "compiled")
    asked = load(tmp_path / "compiled").generate(
        PROMPTS, max_new_tokens=8, eos_token_id=EOS, **GREEDY
    )
    assert answers(asked, len(PROMPTS)) == [
        answer_of_transformers(other, prompt, 8, EOS) for prompt in PROMPTS
    ]


def test_damaged_packages_and_those_of_another_shape_are_compiled_again(
    compiled, model_dir, tmp_path
):
    (kept,) = package_cache.PACKAGES.iterdir()
    (kept / "decode.pt2").write_bytes(b"rubbish")
    assert compiled_again(model_dir, tmp_path / "again")
    assert not compiled_again(model_dir, tmp_path / "kept")
    assert compiled_again(model_dir, tmp_path / "longer", LENGTH + 1)


def test_only_the_last_packages_are_kept(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(package_cache, "PACKAGES", tmp_path / "packages")
    monkeypatch.setattr(package_cache, "KEPT", 2)
    for name in ("a", "b", "c"):
        package_cache.keep(package_cache.PACKAGES / name, compiled)
    assert len(list(package_cache.PACKAGES.iterdir())) == 2
    assert package_cache.take(package_cache.PACKAGES / "c", tmp_path)


def test_packages_that_cannot_be_kept_end_no_stage(
    compiled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(package_cache, "PACKAGES", tmp_path / "a file")
    package_cache.PACKAGES.touch()
    package_cache.keep(package_cache.PACKAGES / "a", compiled)
    assert "note: the packages are not kept for other runs: " in capsys.readouterr().out


def test_weights_that_the_folder_lacks_are_named(model_dir, tmp_path):
    folder = Path(shutil.copytree(model_dir, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"lacks 1 of its weights \(model\.layers\.1\.mlp\.up_proj\.weight\)"
    ):
        compile_inference.compile_model(folder, tmp_path / "compiled", settings=sizes(1, LENGTH))
