"""Conversations as datasets write them: what is read, what is refused, and in which words."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.run.errors import InputError
from stages.text.conversation import (
    Conversation,
    Message,
    answers_of,
    from_json,
    is_empty,
    read_conversation,
    until_last_answer,
)
from stages.text.examples import open_examples
from tests.text.conversations import read

OPENAI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Why?"},
    {"from": "gpt", "value": "Because."},
]
MESSAGES = (
    Message("system", "Be brief."),
    Message("user", "Why?"),
    Message("assistant", "Because."),
)


def conversation(value: object) -> Conversation:
    messages = read_conversation(value, set())
    assert not isinstance(messages, str), messages
    return messages


def said(role: object, content: object = "a", **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    "value", [OPENAI, SHAREGPT, json.dumps(OPENAI), f" {json.dumps(SHAREGPT)}"]
)
def test_both_ways_of_writing_are_read_as_a_list_or_as_json(value: object) -> None:
    assert conversation(value) == MESSAGES


@pytest.mark.parametrize(
    "alias, role",
    [
        *(("human", "user"), ("prompter", "user"), ("User", "user"), (" USER ", "user")),
        *(("gpt", "assistant"), ("chatgpt", "assistant"), ("bot", "assistant")),
        *(("model", "assistant"), ("ai", "assistant"), ("function_call", "assistant")),
        *(("developer", "system"), ("System", "system")),
        *(("function", "tool"), ("observation", "tool"), ("ipython", "tool")),
        ("tool_response", "tool"),
    ],
)
def test_roles_have_the_names_that_datasets_give_them(alias: str, role: str) -> None:
    assert conversation([{"from": alias, "value": "a"}]) == (Message(role, "a"),)


def test_the_parts_of_a_content_are_joined() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]
    assert conversation([said("user", parts)]) == (Message("user", "What is it?"),)


def test_a_system_message_without_text_is_left_out() -> None:
    assert conversation([said("system", " "), said("user")]) == (Message("user", "a"),)


@pytest.mark.parametrize("weight, learn", [(0, False), (0.0, False), (1, True), (None, True)])
def test_an_answer_of_weight_0_is_not_learned(weight: object, learn: bool) -> None:
    messages = conversation([said("user"), said("assistant", weight=weight), said("assistant")])
    assert messages[1].learn == learn
    assert answers_of(messages) == ([1, 2] if learn else [2])


def test_tool_calls_are_kept_for_a_chat_template() -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    messages = conversation(
        [
            said("user"),
            said("assistant", None, tool_calls=calls),
            said("tool", "4", name="add", tool_call_id="1"),
            said("assistant", "It is 4.", reasoning_content="4, then."),
        ]
    )
    assert [message.extra for message in messages] == [
        None,
        {"tool_calls": calls},
        {"name": "add", "tool_call_id": "1"},
        {"reasoning_content": "4, then."},
    ]
    assert messages[1].content == "" and not messages[1].is_empty and not is_empty(messages)


@pytest.mark.parametrize(
    "value, empty",
    [
        ([said("user"), said("assistant")], False),
        ([said("user"), said("assistant", " \n")], True),
        ([said("user", ""), said("assistant")], True),
        ([said("user")], True),
        ([said("user"), said("assistant", weight=0)], True),
        ([], True),
    ],
)
def test_a_conversation_without_an_answer_or_with_an_empty_message_is_empty(
    value: list[Any], empty: bool
) -> None:
    assert is_empty(conversation(value)) == empty


def test_what_follows_the_last_answer_is_answered_by_nothing() -> None:
    messages = conversation([*OPENAI, said("user", "And?"), said("tool", "4")])
    assert until_last_answer(messages) == MESSAGES


@pytest.mark.parametrize("text", ["", "why?", "[1, 2]", "[", "[{}]", '[{"a": 1}]', "[" * 100_000])
def test_a_text_that_holds_no_conversation_stays_a_text(text: str) -> None:
    assert from_json(text) == text


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
REFUSED = {
    # name: (value, what is said of it)
    "a text": ("Why?", "is 'Why?', of type str: it must be a list of messages"),
    "an object": ({"role": "user"}, "of type dict: it must be a list of messages"),
    "texts": (["a"], "message 1 is a str: it must be an object with role and content."),
    "an unknown role": (
        [said("user"), said("narrator")],
        "message 2 has the role 'narrator'. Roles are system, user, assistant, tool, and what "
        "ShareGPT calls them.",
    ),
    "no role": ([{"content": "a"}], "message 1 has no role."),
    "a role that is no text": ([said(["user"])], "message 1 has the role \"['user']\"."),
    "a number": ([said("user", 3)], "message 1 has content that is not text."),
    "an image": (
        [said("user", [{"type": "text", "text": "What is it?"}, IMAGE])],
        "message 1 has content that is not text. Images and sounds are not supported.",
    ),
    "a part without text": ([said("user", [{"type": "text"}])], "message 1 has content that is"),
    "half a surrogate pair": (
        [said("user"), said("assistant", "a\ud83d")],
        "message 2 is not text: character 2 is U+D83D, half of a surrogate pair. Write the "
        "character itself.",
    ),
    "half a surrogate pair in a tool call": (
        [said("assistant", tool_calls=[{"name": "\ud83d"}])],
        "message 1 has tool_calls that JSON cannot hold.",
    ),
    "bytes in a tool call": (
        [said("assistant", tool_calls=[{"name": b"a"}])],
        "message 1 has tool_calls that JSON cannot hold.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_conversation_is_refused_with_the_number_of_the_message(name: str) -> None:
    value, told = REFUSED[name]
    assert told in str(read_conversation(value, set()))


def test_keys_that_nothing_reads_are_named(tmp_path: Path) -> None:
    row = {"messages": [said("user", "a", id=1), said("assistant", "b", score=2, train=None)]}
    (tmp_path / "d.jsonl").write_text(json.dumps({**row, "source": "x"}) + "\n")
    dataset = open_examples(str(tmp_path / "d.jsonl"))
    assert [row.messages for batch in dataset.batches for row in batch] == [
        (Message("user", "a"), Message("assistant", "b"))
    ]
    assert dataset.notes() == ["not read of DATASET: 'id', 'score', 'source'."]


def test_a_csv_cell_and_a_parquet_column_hold_conversations(tmp_path: Path) -> None:
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["conversations"], [json.dumps(SHAREGPT)]])
    pq.write_table(pa.table({"messages": [OPENAI]}), tmp_path / "d.parquet")
    pq.write_table(pa.table({"messages": [json.dumps(OPENAI)]}), tmp_path / "t.parquet")
    for name in ("d.csv", "d.parquet", "t.parquet"):
        assert [row.messages for row in read(tmp_path / name)] == [MESSAGES]


@pytest.mark.parametrize(
    "messages, told",
    [
        (None, "is null"),
        ("Why?", "must be a list of messages"),
        ([said("user"), said("narrator")], "message 2 has the role 'narrator'"),
    ],
)
def test_a_bad_conversation_is_named_by_place_and_column(
    tmp_path: Path, messages: object, told: str
) -> None:
    file = tmp_path / "d.jsonl"
    rows = [{"messages": OPENAI}, {"messages": messages}, {}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError) as refused:
        read(file)
    second, third, counted = refused.value.problems
    assert second.startswith(f"{file}, line 2, column 'messages' ") and told in second
    assert third == f"{file}, line 3, column 'messages' is missing."
    assert counted == "2 of 3 examples have problems."
