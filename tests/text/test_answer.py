"""Asking: which questions a file holds, how an answer streams, and when it counts as ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.run.errors import InputError
from stages.run.settings import Settings
from stages.text.answer import Answerer, Question, read_questions
from stages.text.prompt import PromptTemplate
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


def test_only_the_instruction_is_required(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"instruction": "a"}\n\n{"instruction": "b", "context": null, "response": "c"}\n'
    )
    assert read_questions(file, Settings()) == [Question("a"), Question("b", "", "c")]


NO_QUESTION = [
    "[]",
    "{",
    "{}",
    "\\xff",
    "\0",
    "[" * 100_000,
    '{"instruction": ""}',
    '{"instruction": null}',
    '{"instruction": 3}',
    '{"instruction": "a", "context": 1}',
    '{"instruction": "a", "response": ["b"]}',
    '{"instruction": "half of a pair: \\ud83d"}',
    '{"instruction": "a", "response": "\\ud83d"}',
]


@pytest.mark.torture("data")
@pytest.mark.parametrize("line", NO_QUESTION, ids=lambda line: line[:40])
def test_every_line_that_is_no_question_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{json.dumps({'instruction': 'fine'})}\n{line}\n{line}\n")
    with pytest.raises(InputError) as refused:
        read_questions(file, Settings())
    assert [
        f"line {number}" in problem
        for number, problem in zip((2, 3), refused.value.problems, strict=True)
    ] == [True, True]


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_questions(tmp_path / "empty.jsonl", Settings())


@pytest.mark.torture("data")
def test_the_first_ten_bad_lines_are_named_and_all_are_counted(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("nonsense\n" * 5_000)
    with pytest.raises(InputError) as refused:
        read_questions(tmp_path / "prompts.jsonl", Settings())
    assert len(refused.value.problems) == 11
    assert refused.value.problems[-1] == "5,000 lines have problems; above are the first 10."


@pytest.mark.torture("data")
@pytest.mark.parametrize("name", ["nowhere.jsonl", ".", "/dev/zero"])
def test_prompts_that_are_no_file_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is not a file"):
        read_questions(tmp_path / name, Settings())
