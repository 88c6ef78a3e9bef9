"""Asking: which questions a file holds, how an answer streams, and when it counts as ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.run.contract import Generation
from stages.run.settings import Settings
from stages.text.answer import Answerer
from stages.text.prompt import TextFormat
from stages.text.tokens import TextTokenizer
from tests.conftest import ROOT
from tests.text.conversations import ANSWER_HEADER, question, text_ids
from tests.text.tokenizer_kinds import REAL


class Recites:
    """A model that answers every prompt with the same ids: what is tested is what becomes of
    them."""

    batch_size, sequence_length = 2, 64

    def __init__(self, ids: list[int]):
        self.ids = ids

    def generate(self, prompts: list[list[int]], *, max_new_tokens: int, **_: object) -> Generation:
        steps: Iterator[list[int | None]] = (
            [id] * len(prompts) for id in self.ids[:max_new_tokens]
        )
        return Generation(steps, [-float(len(self.ids))] * len(prompts))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = TextTokenizer.load(ROOT / "data/demo/model")
    tokenizer.save(tmp_path)
    TextFormat(tokenizer).save(tmp_path)
    return tmp_path


def answerer(folder: Path, text: str, **settings: int) -> Answerer:
    ids = text_ids(TextTokenizer.load(folder), text)[1:]  # without BOS
    return Answerer(folder, lambda _: Recites(ids), Settings(**settings))


def test_a_character_of_several_bytes_is_shown_when_it_is_whole(folder: Path) -> None:
    pieces = list(answerer(folder, "naïve 🤗!").stream(question("x")))
    assert "".join(pieces) == "naïve 🤗!"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("make", REAL, ids=lambda make: make.__name__)
@pytest.mark.parametrize("response", ["    y = x + 1\n    return y", "\n- naïve 🤗!", "It is."])
def test_an_answer_is_shown_as_it_was_trained_however_it_begins(
    tmp_path: Path, make: Callable[[Path], Path], response: str
) -> None:
    tokenizer = TextTokenizer.load(make(tmp_path))
    TextFormat(tokenizer).save(tmp_path)
    [(ids, _)] = tokenizer.encode_after([ANSWER_HEADER], [response])
    assert ids is not None
    asked = Answerer(tmp_path, lambda _: Recites(ids), Settings())
    [answer] = asked.answers([question("x", expected=response)])
    pieces = list(asked.stream(question("x")))
    assert "".join(pieces) == answer.answer == answer.question.expected
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_an_answer_has_ended_unless_it_was_cut(folder: Path) -> None:
    [whole] = answerer(folder, "an answer").answers([question("x")])
    [cut] = answerer(folder, "an answer", max_new_tokens=1).answers([question("x")])
    assert (whole.answer, whole.ended) == ("an answer", True)
    assert cut.tokens == 1 and not cut.ended


def test_questions_are_answered_in_order_whatever_the_batch(folder: Path) -> None:
    questions = [question(f"question {number}", expected="same") for number in range(5)]
    answers = list(answerer(folder, "same").answers(questions))
    assert [answer.question for answer in answers] == questions
    assert all(answer.answer == answer.question.expected for answer in answers)
