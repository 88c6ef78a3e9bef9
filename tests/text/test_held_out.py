"""Held-out examples as questions: which they are, and that the file gives them back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.text.conversation import Conversation, Message
from stages.text.dataset import Layout, build
from stages.text.documents import QUESTIONS
from stages.text.examples import Example, open_examples
from stages.text.prompt import TextFormat
from stages.text.questions import Question, write_questions, written_questions
from stages.text.tokens import TextTokenizer
from tests.conftest import ROOT


def pair(number: int) -> Conversation:
    return Message("user", f"Question {number}?", "c" * (number % 2)), Message("assistant", "So.")


def held_out(tmp_path: Path, count: int, fraction: float) -> tuple[list[Conversation], int]:
    tokenizer = TextTokenizer.load(ROOT / "data/demo/model")
    examples = [Example(f"row {number}", pair(number)) for number in range(count)]
    account = build(
        [examples[: count // 2], examples[count // 2 :]],
        tokenizer,
        TextFormat(tokenizer),
        output=tmp_path / "data",
        layout=Layout(64),
        validation_fraction=fraction,
    )
    return account.held_out, account.validation.documents


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3])
def test_they_are_the_documents_for_validation_and_no_others(
    tmp_path: Path, fraction: float
) -> None:
    kept, documents = held_out(tmp_path, 60, fraction)
    assert len(kept) == documents == round(60 * fraction) and len(set(kept)) == len(kept)


def test_of_many_there_are_so_many_as_memory_should_hold(tmp_path: Path) -> None:
    kept, documents = held_out(tmp_path, 800, 0.5)
    assert documents == 400 and len(kept) == QUESTIONS


def test_the_file_gives_the_questions_back_with_their_answers(tmp_path: Path) -> None:
    turns = (Message("system", "Be brief."), *pair(1), *pair(2))
    alone, call = (
        (Message("assistant", "a text"),),
        Message("assistant", "", "", {"tool_calls": [1]}),
    )
    write_questions(tmp_path / "q.jsonl", [pair(3), turns, alone, (*pair(1), call)])
    plain = (*turns[:1], Message("user", "Question 1?"), turns[2], Message("user", "Question 2?"))
    assert written_questions(tmp_path / "q.jsonl") == [
        Question(pair(3)[:1], "So."),
        Question(plain, "So."),
    ]
    assert written_questions(tmp_path / "none.jsonl") == []


def test_only_the_first_examples_are_read_where_a_number_says_so(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"{n}", "completion": "x"}) + "\n" for n in range(2000))
    )
    examples = open_examples(str(file), most=1500)
    assert sum(map(len, examples.batches)) == 1500
    assert any("only the first 1,500 examples" in line for line in examples.read_as)
