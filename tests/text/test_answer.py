"""Asking: which questions a file holds, how an answer streams, and when it counts as ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.run.settings import Settings
from stages.text.answer import Answerer
from stages.text.prompt import PromptTemplate
from stages.text.questions import Question
from stages.text.tokens import TextTokenizer
from tests.conftest import ROOT
from tests.text.tokenizer_kinds import REAL


class Recites:
    """A model that answers every prompt with the same ids: what is tested is what becomes of
    them."""

    batch_size, sequence_length = 2, 64

    def __init__(self, ids: list[int]):
        self.ids = ids

    def generate(
        self, prompts: list[list[int]], *, max_new_tokens: int, **_: object
    ) -> Iterator[list[int | None]]:
        for id in self.ids[:max_new_tokens]:
            yield [id] * len(prompts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TextTokenizer.load(ROOT / "data/demo/model").save(tmp_path)
    PromptTemplate().save(tmp_path / "prompt.json")
    return tmp_path


def answerer(folder: Path, text: str, **settings: int) -> Answerer:
    ids = TextTokenizer.load(folder).encode_prompt(text)[1:]  # without BOS
    return Answerer(folder, Recites(ids), Settings(**settings))


def test_a_character_of_several_bytes_is_shown_when_it_is_whole(folder: Path) -> None:
    pieces = list(answerer(folder, "naïve 🤗!").stream(Question("x")))
    assert "".join(pieces) == "naïve 🤗!"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("make", REAL, ids=lambda make: make.__name__)
@pytest.mark.parametrize("response", ["    y = x + 1\n    return y", "\n- naïve 🤗!", "It is."])
def test_an_answer_is_shown_as_it_was_trained_however_it_begins(
    tmp_path: Path, make: Callable[[Path], Path], response: str
) -> None:
    tokenizer = TextTokenizer.load(make(tmp_path))
    PromptTemplate().save(tmp_path / "prompt.json")
    [[ids], _] = tokenizer.encode_responses(PromptTemplate().response, [response])
    assert ids is not None
    asked = Answerer(tmp_path, Recites(ids), Settings())
    [answer] = asked.answers([Question("x", expected=response)])
    pieces = list(asked.stream(Question("x")))
    assert "".join(pieces) == answer.answer == answer.expected
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_an_answer_has_ended_unless_it_was_cut(folder: Path) -> None:
    [whole] = answerer(folder, "an answer").answers([Question("x")])
    [cut] = answerer(folder, "an answer", max_new_tokens=1).answers([Question("x")])
    assert (whole.answer, whole.ended) == ("an answer", True)
    assert cut.tokens == 1 and not cut.ended


def test_questions_are_answered_in_order_whatever_the_batch(folder: Path) -> None:
    questions = [Question(f"question {number}", expected="same") for number in range(5)]
    answers = list(answerer(folder, "same").answers(questions))
    assert [answer.instruction for answer in answers] == [
        question.instruction for question in questions
    ]
    assert all(answer.answer == answer.expected for answer in answers)
