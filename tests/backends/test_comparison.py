"""The base and the fine-tuned model answer the same held-out questions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.backends.comparison import BaseModel, compare_answers
from stages.run.contract import Generation
from stages.run.gates import gate_problems
from stages.run.settings import Settings
from stages.text.answer import Answerer
from stages.text.conversation import Message
from stages.text.eval_set import EvalSet
from stages.text.prompt import TextFormat
from stages.text.questions import answered_questions
from stages.text.tokens import TextTokenizer
from tests.conftest import ROOT
from tests.tiny_models import SIZES

TOKENIZER = TextTokenizer.load(ROOT / "data/demo/model")


class KnowsTheAnswer:
    """The fine-tuned model: it says "Yes." to everything."""

    batch_size, sequence_length = 2, 64

    def generate(self, prompts: list[list[int]], **given: object) -> Generation:
        assert not given["do_sample"]
        ids = TOKENIZER.encode_after(["\n"], ["Yes."])[0].ids or []
        return Generation(([id] * len(prompts) for id in ids), [-1.5] * len(prompts))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    sizes = {**SIZES, "vocab_size": TOKENIZER.vocab_size}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    model.save_pretrained(tmp_path / "base")
    return Settings(model_id=str(tmp_path / "base"), max_new_tokens=8, bf16=False)


@pytest.fixture
def answerer(tmp_path: Path, settings: Settings) -> Answerer:
    TOKENIZER.save(tmp_path)
    TextFormat(TOKENIZER).save(tmp_path)
    return Answerer(tmp_path, lambda _: KnowsTheAnswer(), replace(settings, do_sample=True))


def held_out(questions: list[str], expected: str = "Yes.") -> EvalSet:
    conversations = [(Message("user", one), Message("assistant", expected)) for one in questions]
    return EvalSet("held-out", None, list(answered_questions(conversations)))


def test_both_answer_the_first_questions_and_what_they_said_is_published(
    settings: Settings, answerer: Answerer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = held_out(["Is it?", "word " * 90, "Was it?", "Will it be?"])
    metrics = compare_answers(replace(settings, compare_answers=3), asked, answerer, tmp_path)
    assert metrics["comparison"] == {
        "set": "held-out",
        "questions": 2,
        "judged": 2,
        "base": {"ended": 0, "exact_matches": 0},
        "fine_tuned": {"ended": 2, "exact_matches": 2},
    }
    lines = [json.loads(line) for line in (tmp_path / "comparison.jsonl").read_text().splitlines()]
    assert [line["instruction"] for line in lines] == ["Is it?", "Was it?"]
    assert all(line["fine_tuned"]["answer"] == line["expected"] == "Yes." for line in lines)
    assert all(line["fine_tuned"]["log_probability"] == -1.5 for line in lines)
    assert [line["base"]["tokens"] for line in lines] == [8, 8]
    shown = capsys.readouterr().out
    assert "1 held-out questions do not fit" in shown and "Q: Is it?" in shown
    # How long it may take, before the first answer.
    forecast = shown.index("the base model's answers take at most about")
    assert forecast < shown.index("Q: Is it?") and "COMPARE_ANSWERS=3, MAX_NEW_TOKENS=8" in shown


@pytest.mark.parametrize(
    ("name", "expected", "judged"),
    [("held-out", 100, 1), ("held-out", 101, 0), ("EVAL_SET", 101, 1)],
)
def test_of_held_out_examples_only_short_answers_are_expected_to_the_letter(
    settings: Settings,
    answerer: Answerer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    expected: int,
    judged: int,
) -> None:
    asked = replace(held_out(["Is it?"], "x" * expected), name=name)
    metrics = compare_answers(settings, asked, answerer, tmp_path)["comparison"]
    assert isinstance(metrics, dict) and metrics["judged"] == judged
    assert ("exact matches" in capsys.readouterr().out) == bool(judged)


def test_nothing_is_asked_where_nothing_is_held_out_or_wanted(
    settings: Settings, answerer: Answerer, tmp_path: Path
) -> None:
    none = replace(settings, compare_answers=0)
    assert compare_answers(none, held_out(["Is it?"]), answerer, tmp_path) == {}
    assert compare_answers(settings, held_out([]), answerer, tmp_path) == {}
    assert not (tmp_path / "comparison.jsonl").exists()


def test_a_gate_on_the_answers_to_an_eval_set_does_not_take_those_to_prompts(
    settings: Settings, answerer: Answerer, tmp_path: Path
) -> None:
    too_long = replace(held_out(["word " * 90]), name="EVAL_SET")
    metrics = compare_answers(settings, too_long, answerer, tmp_path)
    [problem] = gate_problems("ended>0.5", {"answers": 2, "ended": 2, **metrics})
    assert "eval has not measured" in problem


def test_a_base_answer_is_the_likeliest_one_until_its_end(
    settings: Settings, answerer: Answerer
) -> None:
    model = AutoModelForCausalLM.from_pretrained(settings.model_id).eval()
    ids, greedy, nats = [5, 9, 11], list[int](), list[float]()
    for _ in range(8):
        after = model(torch.tensor([ids + greedy])).logits[0, -1].log_softmax(-1)
        greedy.append(int(after.argmax()))
        nats.append(float(after.max().detach()))
    never = 0 if 0 not in greedy else 1

    def answer(length: int, end: int) -> tuple[list[int], float]:
        answerer.format.end = end
        answerer.model.sequence_length = length
        return BaseModel(settings, answerer).answer(ids)

    for length, end, tokens, until in (
        (64, never, 8, 8),
        (64, greedy[5], greedy.index(greedy[5]), greedy.index(greedy[5]) + 1),
        (7, never, 4, 4),
    ):
        answered, log_probability = answer(length, end)
        assert answered == greedy[:tokens]
        assert log_probability == pytest.approx(sum(nats[:until]), abs=1e-4)
