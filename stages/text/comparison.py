"""Answers of the base and the fine-tuned model to the same held-out questions, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.run.json_file import write_json_lines
from stages.text.answer import Answer
from stages.text.questions import Question

SHOWN = 5
_MOST_SHOWN = 300  # characters of an answer on the screen


@dataclass(frozen=True)
class Compared:
    """One held-out question. `ended` as in Answer."""

    question: Question
    base: Answer
    fine_tuned: Answer

    def as_object(self) -> dict[str, Any]:
        """One line of comparison.jsonl."""
        models = {"base": self.base, "fine_tuned": self.fine_tuned}
        return {
            **self.question.as_object(),
            "expected": self.question.expected,
            **{
                name: {"answer": one.answer, "tokens": one.tokens, "ended": one.ended}
                for name, one in models.items()
            },
        }


def write_comparison(path: Path, compared: Iterable[Compared]) -> None:
    write_json_lines(path, (one.as_object() for one in compared))


def comparison_metrics(compared: list[Compared]) -> dict[str, Any]:
    """For a manifest: how many answers of each model end by themselves, and equal the expected."""

    def counts(answers: list[Answer]) -> dict[str, int]:
        return {
            "ended": sum(one.ended for one in answers),
            "exact_matches": sum(one.answer == one.question.expected for one in answers),
        }

    return {
        "questions": len(compared),
        "base": counts([one.base for one in compared]),
        "fine_tuned": counts([one.fine_tuned for one in compared]),
    }


def side_by_side(compared: list[Compared]) -> str:
    """The first questions with both answers, as text for the screen."""
    lines = []
    for one in compared[:SHOWN]:
        lines += [
            f"\n{_short(str(one.question))}",
            f"   expected    {_short(one.question.expected or '')}",
            f"   base        {_short(one.base.answer)}{'' if one.base.ended else ' [cut]'}",
            f"   fine-tuned  {_short(one.fine_tuned.answer)}"
            f"{'' if one.fine_tuned.ended else ' [cut]'}",
        ]
    return "\n".join(lines)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} ..."
