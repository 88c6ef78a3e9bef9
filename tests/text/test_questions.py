"""The file of prompts: what is read of it, what is said of the rest, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.run.errors import InputError
from stages.run.settings import Settings
from stages.text.conversation import Message
from stages.text.questions import Question, question_of, read_questions
from tests.text.conversations import question
from tests.text.conversations import read as read_examples


def read(path: Path, **settings: str) -> list[Question]:
    return read_questions(Settings(prompts=str(path), **settings)).questions


def test_only_the_instruction_is_required(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"instruction": "a"}\n\n{"instruction": "b", "context": null, "response": "c"}\n'
    )
    assert read(file) == [question("a"), question("b", "", "c")]


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
    assert read(tmp_path / name) == [question("a"), question("b")]


def test_prompts_may_have_the_datasets_columns_or_the_usual_ones(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    named = {"instruction_column": "q", "context_column": "c", "response_column": "r"}
    file.write_text('{"q": "a", "c": "b", "r": "d"}')
    assert read(file, **named) == [question("a", "b", "d")]
    file.write_text('{"prompt": "a", "input": "b", "completion": "d"}')
    assert read(file, **named) == [question("a", "b", "d")]
    file.write_text('{"q": "a", "prompt": "other"}')
    assert read(file, **named) == [question("a")]


def test_prompts_without_a_column_for_the_instruction_are_refused_once(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"questions": "a"}\n' * 20)
    with pytest.raises(InputError) as refused:
        read(file, instruction_column="q")
    [problem] = refused.value.problems
    assert problem.startswith(f"PROMPTS={file}: there is no column for the instruction")
    assert "it has 'questions'. Did you mean 'questions'?" in problem


def test_prompts_may_be_texts_alone(tmp_path: Path) -> None:
    file, texts = tmp_path / "p.jsonl", {"instruction_column": "", "response_column": "body"}
    file.write_text('{"text": "Once upon"}')
    assert read(file) == read(file, **texts) == [question("Once upon")]
    file.write_text('{"body": "Once upon", "text": "other"}')
    assert read(file, **texts) == [question("Once upon")]
    file.write_text('{"prompt": "Once upon", "body": "a time"}')
    assert read(file, **texts) == [question("Once upon", "", "a time")]


def test_the_last_answer_of_a_conversation_is_the_expected_one(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *({"role": role, "content": role} for role in ("user", "assistant", "user")),
    ]
    asked = tuple(Message(one["role"], one["content"]) for one in messages)
    file = tmp_path / "p.jsonl"
    rows = [messages, [*messages, {"role": "assistant", "content": "4"}]]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    assert read(file) == [Question(asked), Question(asked, "4")]
    assert read(file)[0].as_object() == {"messages": messages}
    assert str(read(file)[0]) == "Q: user"


@pytest.mark.parametrize(
    "messages, told",
    [
        ([], "asks nothing"),
        ([{"role": "system", "content": "Be brief."}], "asks nothing"),
        ([{"role": "assistant", "content": "Hello."}], "asks nothing"),
        ([{"role": "user", "content": " "}], "has a message without text"),
        ([{"role": "user", "content": 3}], "message 1 has content that is not text"),
        (None, "must be a list of messages"),
    ],
)
def test_a_conversation_that_asks_nothing_is_refused_by_place(
    tmp_path: Path, messages: object, told: str
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    with pytest.raises(InputError) as refused:
        read(file)
    assert f"{file}, line 1, column 'messages'" in str(refused.value)
    assert told in str(refused.value)


def test_prompt_may_be_a_conversation_as_json() -> None:
    assert question_of("Why?", "It rains.") == question("Why?", "It rains.")
    assert question_of("[1, 2]: what is it?") == question("[1, 2]: what is it?")
    asked = question_of(
        '[{"from": "system", "value": "Be brief."}, {"from": "human", "value": "?"}]'
    )
    assert asked.messages == (Message("system", "Be brief."), Message("user", "?"))


@pytest.mark.parametrize(
    "text, context, told",
    [
        ('[{"role": "user", "content": "?"}]', "c", "PROMPT has a CONTEXT"),
        ('[{"role": "assistant", "content": "?"}]', "", "PROMPT asks nothing"),
        ('[{"role": "nobody", "content": "?"}]', "", "PROMPT message 1 has the role 'nobody'"),
    ],
)
def test_a_prompt_that_asks_nothing_is_refused(text: str, context: str, told: str) -> None:
    with pytest.raises(InputError) as refused:
        question_of(text, context)
    assert str(refused.value).startswith(told)


def test_columns_of_the_prompts_that_are_not_read_are_said(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"instruction": "a", "context": "c", "response": "r", "topic": 1}\n')
    settings = Settings(prompts=str(file), context_column="")
    asked = read_questions(settings)
    assert asked.questions == [question("a", "", "r")]
    assert asked.note(settings) == (f"PROMPTS={file}: not read: 'context', 'topic'")
    assert not read_questions(Settings(prompts="data/demo/prompts.jsonl")).note(settings)
    file.write_text('{"messages": [{"role": "user", "content": "a", "id": 1}], "topic": 1}\n')
    assert read_questions(settings).note(settings) == f"PROMPTS={file}: not read: 'topic', 'id'"


def test_nan_in_an_optional_column_is_nothing(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"instruction": "a", "context": NaN, "response": NaN}\n')
    assert read(file) == [question("a")]
    file.write_text('{"instruction": "a", "context": NaN, "response": "b"}\n')
    [example] = read_examples(file)
    assert example.messages == (Message("user", "a"), Message("assistant", "b"))
