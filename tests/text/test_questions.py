"""The file of prompts: what is read of it, what is said of the rest, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.run.errors import InputError
from stages.run.settings import Settings
from stages.text.examples import Columns, read_examples
from stages.text.questions import Question, read_questions


def read(path: Path, **settings: str) -> list[Question]:
    return read_questions(Settings(prompts=str(path), **settings)).questions


def test_only_the_instruction_is_required(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"instruction": "a"}\n\n{"instruction": "b", "context": null, "response": "c"}\n'
    )
    assert read(file) == [Question("a"), Question("b", "", "c")]


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
        read(file)
    assert [
        f"line {number}" in problem
        for number, problem in zip((2, 3), refused.value.problems, strict=True)
    ] == [True, True]


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no prompt"):
        read(tmp_path / "empty.jsonl")


@pytest.mark.torture("data")
def test_the_first_ten_bad_lines_are_named_and_all_are_counted(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("nonsense\n" * 5_000)
    with pytest.raises(InputError) as refused:
        read(tmp_path / "prompts.jsonl")
    assert len(refused.value.problems) == 11
    assert refused.value.problems[-1] == "5,000 prompts have problems; above are the first 10."


@pytest.mark.torture("data")
@pytest.mark.parametrize("name", ["nowhere.jsonl", ".", "/dev/zero"])
def test_prompts_that_are_no_file_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is not a file"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", '[{"instruction": "a"}, {"instruction": "b"}]'),
        ("p.jsonl", '[{"instruction": "a"}, {"instruction": "b"}]'),
        ("p.csv", "instruction,context\na,\nb,\n"),
    ],
)
def test_prompts_have_any_format_that_a_dataset_has(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    assert read(tmp_path / name) == [Question("a"), Question("b")]


def test_prompts_with_other_columns_than_the_datasets_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"questions": "a"}\n' * 20)
    with pytest.raises(InputError) as refused:
        read(file, instruction_column="question")
    assert refused.value.problems[0].startswith(
        f"PROMPTS={file} has no column 'question', which INSTRUCTION_COLUMN names; it has "
        "'questions'. Did you mean 'questions'?"
    )


def test_columns_of_the_prompts_that_are_not_read_are_said(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"instruction": "a", "context": "c", "response": "r", "topic": 1}\n')
    settings = Settings(prompts=str(file), context_column="input")
    asked = read_questions(settings)
    assert asked.questions == [Question("a", "", "r")]
    assert asked.note(settings) == (
        f"PROMPTS={file}: not read: 'context', 'topic' (INSTRUCTION_COLUMN=instruction, "
        "CONTEXT_COLUMN=input, RESPONSE_COLUMN=response)"
    )
    assert not read_questions(Settings(prompts="data/demo/prompts.jsonl")).note(settings)


def test_nan_in_an_optional_column_is_nothing(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"instruction": "a", "context": NaN, "response": NaN}\n')
    assert read(file) == [Question("a")]
    [[example]] = read_examples(str(file), columns=Columns(response=""))
    assert example.context == ""
