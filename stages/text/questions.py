"""The questions that eval answers: those of the file PROMPTS, or PROMPT.

Standard library only, so that make can check the file before anything runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from stages.run.errors import InputError
from stages.run.json_file import write_json_lines
from stages.run.settings import Settings
from stages.text.columns import AUTO, USUAL, Columns, find_columns
from stages.text.conversation import (
    Conversation,
    Message,
    from_json,
    read_conversation,
)
from stages.text.examples import PROBLEMS_SHOWN, fault
from stages.text.formats import FORMAT_NAMES, Problem
from stages.text.sources import open_local


@dataclass(frozen=True)
class Question:
    """A conversation that ends with what is asked. `place` names it in messages; `expected` is the
    answer that it should get, None if it has none."""

    messages: Conversation
    expected: str | None = None
    place: str = field(default="PROMPT", compare=False)

    def __str__(self) -> str:
        """The question as the screen shows it: what was asked last."""
        *_, last = self.messages
        context = f"\n   ({last.context})" if last.context else ""
        return f"Q: {last.content}{context}"

    def as_object(self) -> dict[str, Any]:
        """The question as answers.jsonl has it: instruction and context, or the messages."""
        if len(self.messages) == 1 and self.messages[0].role == "user":
            return {"instruction": self.messages[0].content, "context": self.messages[0].context}
        return {"messages": [{"role": one.role, "content": one.content} for one in self.messages]}


@dataclass(frozen=True)
class Questions:
    """What PROMPTS holds. `unread`: names of its columns that are not read. `notes`: what was found
    out about its format."""

    questions: list[Question]
    unread: list[str]
    notes: tuple[str, ...] = ()

    def note(self, settings: Settings) -> str:
        """What of the file is not read, and how it is read, as a line; empty for nothing."""
        notes = list(self.notes)
        if self.unread:
            notes.append(f"not read: {', '.join(map(repr, self.unread[:10]))}")
        return f"PROMPTS={settings.prompts}: {'; '.join(notes)}" if notes else ""


def question_of(text: str, context: str = "") -> Question:
    """The question that PROMPT holds: one instruction, or a conversation as JSON."""
    value = from_json(text)
    if isinstance(value, str):
        return Question((Message("user", text, context),))
    messages = read_conversation(value, set())
    if isinstance(messages, str):
        raise InputError(f"PROMPT {messages}")
    problem = _unasked(messages)
    if context and not problem:
        problem = "has a CONTEXT, which belongs to one instruction. Write it into a message."
    if problem:
        raise InputError(f"PROMPT {problem}")
    return Question(messages)


def read_questions(settings: Settings) -> Questions:
    """The questions in PROMPTS, a file of any format that DATASET may have: instructions, or
    conversations whose last answer is the expected one.

    Raises InputError for a file that cannot be read and for records that are no questions: names
    the first ten and counts all.
    """
    path = Path(settings.prompts)
    if not path.is_file():
        raise InputError(
            f"PROMPTS={path} is not a file. Name one ({FORMAT_NAMES}) with an instruction or a "
            "conversation in each example."
        )
    named = Columns(
        settings.instruction_column or AUTO,
        settings.context_column,
        settings.response_column,
        settings.messages_column,
    )
    source = open_local(path, "train", sorted(named.wanted | Columns().wanted))
    records = list(source.read())
    read = [record for _, record in records if not isinstance(record, Problem)]
    existing = source.columns or list(dict.fromkeys(name for record in read for name in record))
    columns = Columns("", "", "", "")
    if read:
        texts = "" if settings.instruction_column else settings.response_column
        of_dataset = _of(named, existing, texts)
        columns = find_columns(f"PROMPTS={path}", existing, of_dataset, answered=False)
    keys = set[str]()  # of messages, that nothing reads
    made = [
        f"{place} {record}"
        if isinstance(record, Problem)
        else _question(place, record, columns, keys)
        for place, record in records
    ]
    questions = [one for one in made if isinstance(one, Question)]
    problems = [one for one in made if isinstance(one, str)]
    if not questions and not problems:
        problems.append(f"PROMPTS={path} holds no prompt. Write one object per line.")
    if problems:
        raise InputError(first_problems(problems))
    unread = [name for name in existing if name not in columns.named]
    return Questions(questions, [*unread, *sorted(keys)], source.notes)


def _of(named: Columns, existing: list[str], texts: str) -> Columns:
    """The columns that the settings name for DATASET, as far as PROMPTS has them. `texts`: its
    column of texts without a prompt, which hold what is asked where nothing else does."""
    if texts in existing and not any(name.lower() in USUAL["instruction"] for name in existing):
        return Columns(texts, "", "", "")
    return Columns(*(name if name in ("", *existing) else AUTO for name in astuple(named)))


def answered_questions(conversations: Iterable[Conversation], name: str = "") -> Iterator[Question]:
    """What is asked before the last answers, which are expected; `name`: of a question, before its
    number. Texts without a prompt ask nothing, and conversations with tool calls are left out."""
    for number, messages in enumerate(conversations, start=1):
        if len(messages) > 1 and not any(message.extra for message in messages):
            yield Question(messages[:-1], messages[-1].content, f"{name} {number}")


def write_questions(path: Path, conversations: list[Conversation]) -> None:
    """A file that `written_questions` reads."""
    asked = answered_questions(conversations)
    write_json_lines(path, ({**one.as_object(), "expected": one.expected} for one in asked))


def written_questions(path: Path) -> list[Question]:
    """What `write_questions` wrote; none where the file does not exist."""
    if not path.is_file():
        return []
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        saved = json.loads(line)
        messages = read_conversation(saved.get("messages", []), set())
        if "instruction" in saved:
            messages = (Message("user", saved["instruction"], saved["context"]),)
        assert not isinstance(messages, str)  # our own file
        questions.append(Question(messages, saved["expected"], f"held-out question {number}"))
    return questions


def first_problems(problems: list[str]) -> list[str]:
    """The first of the prompts' problems, and how many there are if that is not all."""
    if len(problems) <= PROBLEMS_SHOWN:
        return problems
    count = f"{len(problems):,} prompts have problems; above are the first {PROBLEMS_SHOWN}."
    return [*problems[:PROBLEMS_SHOWN], count]


def _question(
    place: str, record: dict[str, Any], columns: Columns, unread: set[str]
) -> Question | str:
    """The record as a question, or its problem. Adds the keys that nothing reads to `unread`."""
    if columns.messages:
        name = columns.messages
        messages = read_conversation(record.get(name), unread)
        if isinstance(messages, str):
            return f"{place}, column {name!r} {messages}"
        expected = None
        if messages and messages[-1].role == "assistant":
            *asked, last = messages
            messages, expected = tuple(asked), last.content
        problem = _unasked(messages)
        if problem:
            return f"{place}, column {name!r} {problem}"
        return Question(messages, expected, place)
    texts: list[Any] = []
    for name, required in (
        (columns.instruction, True),
        (columns.context, False),
        (columns.response, False),
    ):
        text: Any = record.get(name) if name else None
        absent = text is None or text != text  # null, or pandas' NaN
        if problem := fault(text, name in record) if required or not absent else "":
            return f"{place}, column {name!r} {problem}"
        texts.append(None if absent else text)
    instruction, context, expected = texts
    if not instruction.strip():
        return f"{place}, column {columns.instruction!r} is empty."
    return Question((Message("user", instruction, context or ""),), expected, place)


def _unasked(messages: Conversation) -> str:
    """Why nothing is asked in a conversation, as the end of a sentence; "" where something is."""
    if not messages or messages[-1].role not in ("user", "tool"):
        return "asks nothing: its last message must be a user's, or an answer after it."
    if any(message.is_empty for message in messages):
        return "has a message without text."
    return ""
