"""Answers of the base and the fine-tuned model to the same questions, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.run.json_file import write_json_lines
from stages.text.answer import Answer
from stages.text.questions import Question

SHOWN = 5
SHORT = 100  # characters of an expected answer that may well be met to the letter
_MOST_SHOWN = 300  # characters of an answer on the screen


@dataclass(frozen=True)
class Compared:
    """One question with the answers of both models."""

    question: Question
    base: Answer
    fine_tuned: Answer

    def as_object(self) -> dict[str, Any]:
        """One line of comparison.jsonl."""
        return {
            **self.question.as_object(),
            "expected": self.question.expected,
            "base": self.base.figures(),
            "fine_tuned": self.fine_tuned.figures(),
        }


def write_comparison(path: Path, compared: Iterable[Compared]) -> None:
    write_json_lines(path, (one.as_object() for one in compared))


def comparison_metrics(compared: list[Compared], short_only: bool) -> dict[str, Any]:
    """For a manifest: how many answers of each model end by themselves, and how many of `judged`
    equal the expected one. `short_only` judges only those that are expected to be SHORT."""

    def is_judged(answer: Answer) -> bool:
        expected = answer.question.expected
        return expected is not None and (not short_only or len(expected) <= SHORT)

    def counts(answers: list[Answer]) -> dict[str, int]:
        return {
            "ended": sum(one.ended for one in answers),
            "exact_matches": sum(
                is_judged(one) and one.answer == one.question.expected for one in answers
            ),
        }

    return {
        "questions": len(compared),
        "judged": sum(is_judged(one.base) for one in compared),
        "base": counts([one.base for one in compared]),
        "fine_tuned": counts([one.fine_tuned for one in compared]),
    }


def comparison_table(metrics: dict[str, Any], name: str) -> str:
    """What `comparison_metrics` counted, as a table for the screen."""
    lines = [f"\n{name + ' questions':<20}{'base':>10} {'fine-tuned':>12}"]
    for counted, label, of in (
        ("ended", "answers that end", metrics["questions"]),
        ("exact_matches", "exact matches", metrics["judged"]),
    ):
        figures = f"{metrics['base'][counted]:>10} {metrics['fine_tuned'][counted]:>12}"
        if of:
            lines.append(f"  {label:<18}{figures}   of {of}")
    return "\n".join(lines)


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
