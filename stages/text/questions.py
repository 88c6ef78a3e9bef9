"""The file PROMPTS: the questions that eval answers, in DATASET's columns.

Standard library only, so that make can check the file before anything runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from stages.run.errors import InputError
from stages.run.settings import Settings
from stages.text.examples import PROBLEMS_SHOWN, fault
from stages.text.formats import FORMAT_NAMES, Problem, Record
from stages.text.sources import open_local


@dataclass(frozen=True)
class Question:
    """One example of PROMPTS. `place` names it in messages; `expected` is its response, None if it
    has none."""

    instruction: str
    context: str = ""
    expected: str | None = None
    place: str = field(default="PROMPT", compare=False)


@dataclass(frozen=True)
class Questions:
    """What PROMPTS holds. `unread`: names of its columns that no setting names. `notes`: what was
    found out about its format."""

    questions: list[Question]
    unread: list[str]
    notes: tuple[str, ...] = ()

    def note(self, settings: Settings) -> str:
        """What of the file is not read, and how it is read, as a line; empty for nothing."""
        notes = list(self.notes)
        if self.unread:
            notes.append(
                f"not read: {', '.join(map(repr, self.unread[:10]))} "
                f"(INSTRUCTION_COLUMN={settings.instruction_column}, CONTEXT_COLUMN="
                f"{settings.context_column}, RESPONSE_COLUMN={settings.response_column})"
            )
        return f"PROMPTS={settings.prompts}: {'; '.join(notes)}" if notes else ""


def read_questions(settings: Settings) -> Questions:
    """The questions in PROMPTS, a file of any format that DATASET may have. Only the instruction is
    required.

    Raises InputError for a file that cannot be read and for records that are no questions: names
    the first ten and counts all.
    """
    path = Path(settings.prompts)
    wanted = f"with {settings.instruction_column!r} in each"
    if not path.is_file():
        raise InputError(f"PROMPTS={path} is not a file. Name one ({FORMAT_NAMES}) {wanted}.")
    columns = [settings.instruction_column, settings.context_column, settings.response_column]
    source = open_local(path, "train", [name for name in columns if name])
    questions, problems = [], []
    seen = dict.fromkeys(source.columns or ())
    for place, record in source.read():
        question = _question(place, record, columns)
        seen |= {} if isinstance(record, Problem) else dict.fromkeys(record)
        if isinstance(question, Question):
            questions.append(question)
        else:
            problems.append(question)
    if not questions and not problems:
        problems.append(f"PROMPTS={path} holds no prompt. Write one object per line, {wanted}.")
    if problems:
        problems = first_problems(problems)
        if seen and settings.instruction_column not in seen:
            problems = [_no_column(path, settings, list(seen)), *problems[:1]]
        raise InputError(problems)
    return Questions(questions, [name for name in seen if name not in columns], source.notes)


def first_problems(problems: list[str]) -> list[str]:
    """The first of the prompts' problems, and how many there are if that is not all."""
    if len(problems) <= PROBLEMS_SHOWN:
        return problems
    count = f"{len(problems):,} prompts have problems; above are the first {PROBLEMS_SHOWN}."
    return [*problems[:PROBLEMS_SHOWN], count]


def _no_column(path: Path, settings: Settings, columns: list[str]) -> str:
    near = get_close_matches(settings.instruction_column, columns, n=1)
    hint = f" Did you mean {near[0][:60]!r}?" if near else ""
    return (
        f"PROMPTS={path} has no column {settings.instruction_column!r}, which INSTRUCTION_COLUMN "
        f"names; it has {', '.join(repr(name[:60]) for name in columns[:20]) or 'none'}.{hint} "
        "Name a file with DATASET's columns in PROMPTS."
    )


def _question(place: str, record: Record, columns: list[str]) -> Question | str:
    """The record as a question, or its problem."""
    if isinstance(record, Problem):
        return f"{place} {record}"
    instruction: Any
    instruction, context, expected = (record.get(name) if name else None for name in columns)
    for name, text, required in zip(
        columns, (instruction, context, expected), (True, False, False), strict=True
    ):
        absent = text is None or text != text  # null, or pandas' NaN
        if problem := fault(text, name in record) if required or not absent else "":
            return f"{place}, column {name!r} {problem}"
    if not instruction.strip():
        return f"{place}, column {columns[0]!r} is empty."
    given = (value if isinstance(value, str) else None for value in (context, expected))
    context, expected = given
    return Question(instruction, context or "", expected, place)
