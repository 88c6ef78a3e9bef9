"""EVAL_SET: a file of examples that eval measures on, in place of those that were held out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import load_from_disk

from stages.run.errors import InputError
from stages.run.settings import Settings
from stages.text.conversation import Message
from stages.text.eval_set import packed_eval_set, read_eval_set
from stages.text.prompt import TextFormat
from stages.text.questions import Question
from stages.text.tokens import TextTokenizer
from tests.conftest import ROOT

TOKENIZER = TextTokenizer.load(ROOT / "data/demo/model")
ROWS = [{"question": f"How many is {n}?", "answer": f"It is {n}."} for n in range(30)]


def file_of(tmp_path: Path, rows: list[dict[str, object]]) -> Settings:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Settings(
        eval_set=str(path), compare_answers=3, max_length=64, overlong="error", loss_on="response"
    )


def test_every_example_is_measured_and_the_first_are_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the training wrote and packed its own: what is supervised is what LOSS_ON says."""
    settings = replace(file_of(tmp_path, [*ROWS]), packing="concat")
    found = packed_eval_set(settings, TOKENIZER, TextFormat(TOKENIZER), tmp_path / "packed")
    assert found.name == "EVAL_SET" and found.sequences is not None
    assert found.questions == [
        Question((Message("user", f"How many is {n}?"),), f"It is {n}.") for n in range(3)
    ]
    rows = load_from_disk(str(found.sequences)).with_format("numpy")[:]
    text = TOKENIZER.decode([id for row in rows["input_ids"].tolist() for id in row])
    assert all(f"How many is {n}?" in text and f"It is {n}." in text for n in range(30))
    learned = [id for row in rows["labels"].tolist() for id in row if id != -100]
    assert "How many" not in TOKENIZER.decode(learned)
    said = capsys.readouterr().out
    assert "EVAL_SET" in said and "instruction in 'question'" in said
    assert f"30 examples, {int((rows['input_ids'] != TOKENIZER.pad).sum()):,} tokens in" in said


def test_examples_that_are_too_long_are_cut_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = file_of(tmp_path, [*ROWS, {"question": "?", "answer": "long " * 200}])
    packed_eval_set(settings, TOKENIZER, TextFormat(TOKENIZER), tmp_path / "packed")
    assert "31 examples, 1 cut to MAX_LENGTH, " in capsys.readouterr().out


def test_examples_that_are_left_out_are_counted_and_not_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [{"question": "long " * 200, "answer": "!"}, {"question": "?", "answer": ""}]
    settings = file_of(tmp_path, [more[1], *ROWS, more[0]])
    found = packed_eval_set(settings, TOKENIZER, TextFormat(TOKENIZER), tmp_path / "packed")
    assert [one.expected for one in found.questions] == [f"It is {n}." for n in range(3)]
    said = capsys.readouterr().out
    assert "32 examples, 1 without a question or an answer left out, 1 left out, with no" in said


def test_a_folder_is_refused_because_its_train_split_would_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        read_eval_set(replace(file_of(tmp_path, [*ROWS]), eval_set=str(tmp_path)))


def test_what_packing_refuses_names_eval_set(tmp_path: Path) -> None:
    settings = file_of(tmp_path, [{"question": "a", "answer": ""}])
    with pytest.raises(InputError, match=r"^EVAL_SET=.*None of the 1 examples"):
        packed_eval_set(settings, TOKENIZER, TextFormat(TOKENIZER), tmp_path / "packed")


def test_conversations_are_asked_for_their_last_answer(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    found = packed_eval_set(
        file_of(tmp_path, rows), TOKENIZER, TextFormat(TOKENIZER), tmp_path / "packed"
    )
    [question] = found.questions
    assert [one.content for one in question.messages] == ["a", "b", "c"]
    assert question.expected == "d"


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "has no examples"),
        ([{"question": "a"}], "response"),
        ([*ROWS, {"question": "a", "answer": None}], "line 31, column 'answer' is null"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    tmp_path: Path, rows: list[dict[str, object]], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        read_eval_set(file_of(tmp_path, rows))
