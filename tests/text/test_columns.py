"""Which columns of a dataset are read: those with usual names, or those that settings name."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.run.errors import InputError
from stages.run.settings import Settings
from stages.text.columns import Columns, find_columns
from stages.text.conversation import Message
from stages.text.examples import open_examples
from tests.text.conversations import example, read

USUAL = {
    # name: (the dataset's columns, those that are read)
    "Dolly": (
        ["instruction", "context", "response", "category"],
        Columns("instruction", "context", "response", ""),
    ),
    "Alpaca": (
        ["instruction", "input", "output", "text"],
        Columns("instruction", "input", "output", ""),
    ),
    "prompt and completion": (["prompt", "completion"], Columns("prompt", "", "completion", "")),
    "question and answer": (["id", "question", "answer"], Columns("question", "", "answer", "")),
    "question, context and answer": (
        ["question", "context", "answer"],
        Columns("question", "context", "answer", ""),
    ),
    "prompt and response": (["prompt", "response"], Columns("prompt", "", "response", "")),
    "capitalised": (["Question", "Answer"], Columns("Question", "", "Answer", "")),
    "in capitals": (
        ["INSTRUCTION", "INPUT", "OUTPUT"],
        Columns("INSTRUCTION", "INPUT", "OUTPUT", ""),
    ),
    "messages": (["messages", "source"], Columns("", "", "", "messages")),
    "ShareGPT": (["id", "conversations"], Columns("", "", "", "conversations")),
    "messages before a prompt": (["prompt", "messages"], Columns("", "", "", "messages")),
    "text": (["text", "url"], Columns("", "", "text", "")),
    "capitalised text": (["Text"], Columns("", "", "Text", "")),
    "the project's own names before others": (
        ["prompt", "completion", "instruction", "response"],
        Columns("instruction", "", "response", ""),
    ),
}


@pytest.mark.parametrize("name", USUAL)
def test_a_usual_layout_is_found_by_its_names(name: str) -> None:
    existing, found = USUAL[name]
    assert find_columns("d", existing, Columns()) == found


@pytest.mark.parametrize(
    "existing, told",
    [
        (
            ["prompt", "completion", "question", "answer"],
            "d: the instruction and the response may be 'prompt' with 'completion' or 'question' "
            "with 'answer'. Set INSTRUCTION_COLUMN and RESPONSE_COLUMN.",
        ),
        (
            ["prompt", "question", "response"],
            "d: any of 'prompt', 'question' may be the instruction. Set INSTRUCTION_COLUMN to one "
            "of them.",
        ),
        (
            ["question", "Response", "output"],
            "d: any of 'Response', 'output' may be the response. Set RESPONSE_COLUMN to one of "
            "them.",
        ),
        (
            ["instruction", "context", "input", "response"],
            "d: any of 'context', 'input' may be the context. Set CONTEXT_COLUMN to one of them.",
        ),
        (
            ["messages", "conversations"],
            "d: any of 'messages', 'conversations' may be the messages. Set MESSAGES_COLUMN to one "
            "of them.",
        ),
    ],
)
def test_names_that_leave_a_choice_are_refused_with_the_setting_that_makes_it(
    existing: list[str], told: str
) -> None:
    with pytest.raises(InputError) as refused:
        find_columns("d", existing, Columns())
    assert str(refused.value) == told


NAMED = {
    # name: (the dataset's columns, what the settings name, what is read)
    "all": (["q", "c", "a"], Columns("q", "c", "a"), Columns("q", "c", "a", "")),
    "the instruction": (
        ["q", "input", "output"],
        Columns("q"),
        Columns("q", "input", "output", ""),
    ),
    "no context": (
        ["instruction", "input", "output"],
        Columns(context=""),
        Columns("instruction", "", "output", ""),
    ),
    "one pair of two": (
        ["prompt", "completion", "question", "answer"],
        Columns("question", response="answer"),
        Columns("question", "", "answer", ""),
    ),
    "columns beside messages": (
        ["messages", "prompt", "completion"],
        Columns("prompt", "", "completion"),
        Columns("prompt", "", "completion", ""),
    ),
    "messages": (["chat", "prompt"], Columns(messages="chat"), Columns("", "", "", "chat")),
    "texts without a prompt": (
        ["title", "body"],
        Columns(instruction="", response="body"),
        Columns("", "", "body", ""),
    ),
    "an instruction that is a usual name of the context": (
        ["input", "output"],
        Columns("input"),
        Columns("input", "", "output", ""),
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_settings_name_columns_and_the_others_are_found(name: str) -> None:
    existing, columns, found = NAMED[name]
    assert find_columns("d", existing, columns) == found


@pytest.mark.parametrize(
    "existing, columns, told",
    [
        (
            ["quetsion", "answer"],
            Columns("question"),
            "d: there is no column 'question'; it has 'quetsion', 'answer'. Did you mean "
            "'quetsion'? Set INSTRUCTION_COLUMN to its name.",
        ),
        (
            ["instruction", "response"],
            Columns(context="source"),
            "d: there is no column 'source'; it has 'instruction', 'response'. Set CONTEXT_COLUMN "
            "to its name, or to nothing if there is none.",
        ),
        (
            ["messages"],
            Columns(messages="chat"),
            "d: there is no column 'chat'; it has 'messages'. Set MESSAGES_COLUMN to its name.",
        ),
        (
            ["instruction", "response", "response"],
            Columns(),
            "d: 2 columns are called 'response'. Rename all but one.",
        ),
        ([], Columns("q", "", "a"), "d: there is no column 'q'; it has no columns."),
    ],
)
def test_a_named_column_that_does_not_exist_or_exists_twice_is_refused(
    existing: list[str], columns: Columns, told: str
) -> None:
    with pytest.raises(InputError) as refused:
        find_columns("d", existing, columns)
    assert str(refused.value).startswith(told)


def test_what_is_read_is_said_and_so_is_what_is_not(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(
        '{"instruction": "a", "input": "b", "output": "c"}\n{"instruction": "a", '
        '"output": "c", "topic": 1}\n'
    )
    dataset = open_examples(str(file))
    assert dataset.read_as == (
        f"DATASET={file}: instruction in 'instruction', context in 'input', response in 'output'",
    )
    assert [row.messages[0].context for batch in dataset.batches for row in batch] == ["b", ""]
    assert dataset.notes() == ["not read of DATASET: 'topic'."]


def test_a_context_that_only_a_later_record_has_is_found(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    rows = [{"instruction": "a", "output": "b"}] * 40 + [
        {"instruction": "a", "output": "b", "Input": "c"}
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.messages[0].context for row in read(file)] == [*[""] * 40, "c"]
    assert read(file, columns=Columns(context=""))[-1] == example(f"{file}, line 41", "a", "", "b")


def test_only_the_columns_that_are_wanted_are_read_of_parquet_and_the_others_are_named(
    tmp_path: Path,
) -> None:
    table = pa.table({"question": ["a"], "answer": ["b"], "image": [b"\xff" * 100]})
    pq.write_table(table, tmp_path / "d.parquet")
    dataset = open_examples(str(tmp_path / "d.parquet"))
    assert [row.messages for batch in dataset.batches for row in batch] == [
        (Message("user", "a"), Message("assistant", "b"))
    ]
    assert dataset.notes() == ["not read of DATASET: 'image'."]


def test_a_text_alone_is_an_answer_without_a_question(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "Once upon a time"}\n')
    [row] = read(tmp_path / "d.jsonl")
    assert row.messages == (Message("assistant", "Once upon a time"),)


@pytest.mark.parametrize(
    "given, told",
    [
        ({"MESSAGES_COLUMN": "chat", "RESPONSE_COLUMN": "a"}, "Set one or the other"),
        ({"INSTRUCTION_COLUMN": ""}, "Set RESPONSE_COLUMN to the column of the texts"),
    ],
)
def test_settings_that_name_columns_in_two_ways_are_refused(
    given: dict[str, str], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        Settings.read(given)


def test_a_context_that_only_late_records_have_is_not_dropped(tmp_path: Path) -> None:
    rows = [{"instruction": "Why?", "response": "So."}] * 150 + [
        {"instruction": "Who?", "context": "Ann is here.", "response": "Ann."}
    ]
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(InputError, match="'context' first comes after 100 examples"):
        list(open_examples(str(file)).batches)
    named, none = (
        [one for batch in open_examples(str(file), columns=columns).batches for one in batch]
        for columns in (Columns(context="context"), Columns(context=""))
    )
    assert named[-1].messages[0].context == "Ann is here." and not named[0].messages[0].context
    assert not none[-1].messages[0].context
