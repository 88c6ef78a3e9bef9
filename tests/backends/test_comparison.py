"""The base and the fine-tuned model answer the same held-out questions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.backends.comparison import base_answers, compare_answers
from stages.run.settings import Settings
from stages.text.answer import Answerer
from stages.text.conversation import Message
from stages.text.prompt import TextFormat
from stages.text.questions import write_questions
from stages.text.tokens import TextTokenizer
from tests.conftest import ROOT
from tests.tiny_models import SIZES

TOKENIZER = TextTokenizer.load(ROOT / "data/demo/model")


class KnowsTheAnswer:
    """The fine-tuned model: it says "Yes." to everything."""

    batch_size, sequence_length = 2, 64

    def generate(self, prompts: list[list[int]], **given: object) -> Iterator[list[int | None]]:
        assert not given["do_sample"]
        for id in TOKENIZER.encode_after(["\n"], ["Yes."])[0].ids or []:
            yield [id] * len(prompts)


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


def held_out(tmp_path: Path, questions: list[str]) -> Path:
    write_questions(
        tmp_path / "held_out.jsonl",
        [(Message("user", one), Message("assistant", "Yes.")) for one in questions],
    )
    return tmp_path / "held_out.jsonl"


def test_both_answer_the_first_questions_and_what_they_said_is_published(
    settings: Settings, answerer: Answerer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = held_out(tmp_path, ["Is it?", "word " * 90, "Was it?", "Will it be?"])
    metrics = compare_answers(replace(settings, compare_answers=3), file, answerer, tmp_path)
    assert metrics["comparison"] == {
        "questions": 2,
        "base": {"ended": 0, "exact_matches": 0},
        "fine_tuned": {"ended": 2, "exact_matches": 2},
    }
    lines = [json.loads(line) for line in (tmp_path / "comparison.jsonl").read_text().splitlines()]
    assert [line["instruction"] for line in lines] == ["Is it?", "Was it?"]
    assert all(line["fine_tuned"]["answer"] == line["expected"] == "Yes." for line in lines)
    assert [line["base"]["tokens"] for line in lines] == [8, 8]
    shown = capsys.readouterr().out
    assert "1 held-out questions do not fit" in shown and "Q: Is it?" in shown


def test_nothing_is_asked_where_nothing_is_held_out_or_wanted(
    settings: Settings, answerer: Answerer, tmp_path: Path
) -> None:
    file = held_out(tmp_path, ["Is it?"])
    assert compare_answers(replace(settings, compare_answers=0), file, answerer, tmp_path) == {}
    assert compare_answers(settings, tmp_path / "none.jsonl", answerer, tmp_path) == {}
    assert not (tmp_path / "comparison.jsonl").exists()


def test_a_base_answer_is_the_likeliest_one_until_its_end(settings: Settings) -> None:
    model = AutoModelForCausalLM.from_pretrained(settings.model_id).eval()
    ids, greedy = [5, 9, 11], list[int]()
    for _ in range(8):
        greedy.append(int(model(torch.tensor([ids + greedy])).logits[0, -1].argmax()))
    end = greedy[5]

    def answers(length: int, end: int) -> list[int]:
        [answer] = base_answers(settings, [ids], end=end, pad=0, sequence_length=length)
        return answer

    assert answers(64, end=0 if 0 not in greedy else 1) == greedy
    assert answers(64, end=end) == greedy[: greedy.index(end)]
    assert len(answers(7, end=0 if 0 not in greedy else 1)) == 4
