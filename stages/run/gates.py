"""GATES: what eval's figures must reach, such as `validation_loss<2.0 exact_match>0.5 ended>0.9`.

Standard library only: make reads the setting at every start.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from stages.run.errors import InputError

# What a gate may name, and where eval's metrics have it.
FIGURES = {
    "validation_loss": "loss of the fine-tuned model on the held-out sequences, or on EVAL_SET",
    "base_loss": "loss of the base model on them",
    "perplexity": "perplexity of the fine-tuned model on them",
    "exact_match": "share of the answers to EVAL_SET, or else PROMPTS, that are as expected",
    "ended": "share of those answers that the model ended itself",
}
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_GATE = re.compile(r"(\w+)(<=|>=|<|>)(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)", re.ASCII)


class Gate(NamedTuple):
    figure: str
    sign: str
    bound: float


def parse_gates(text: str) -> list[Gate]:
    """The gates of a text; raises InputError for what is none."""
    gates, problems = [], []
    for word in re.sub(r"\s*(<=|>=|<|>)\s*", r"\1", text.strip()).split():
        match = _GATE.fullmatch(word)
        if not match:
            problems.append(f"{word[:60]!r} is no gate. Write FIGURE<NUMBER or FIGURE>NUMBER.")
        elif match[1] not in FIGURES:
            near = get_close_matches(match[1], FIGURES, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            problems.append(f"{match[1][:60]} is none of {', '.join(FIGURES)}.{hint}")
        else:
            gates.append(Gate(match[1], match[2], float(match[3])))
    if problems:
        raise InputError(problems)
    return gates


def gate_problems(text: str, metrics: Mapping[str, Any]) -> list[str]:
    """Each gate that eval's metrics do not pass, with the figure."""
    problems = []
    for gate in parse_gates(text):
        value = _figures(metrics).get(gate.figure)
        shown = f"{gate.figure}{gate.sign}{gate.bound:g}"
        if value is None:
            problems.append(f"GATES: {shown}: eval has not measured {FIGURES[gate.figure]}.")
        elif not _COMPARE[gate.sign](value, gate.bound):
            problems.append(f"GATES: {shown}: {gate.figure} is {value:.4g}.")
    return problems


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    figures: dict[str, float] = {}
    counts = metrics
    if (compared := metrics.get("comparison", {})).get("set") == "EVAL_SET":
        counts = {**compared, **compared["fine_tuned"], "answers": compared["questions"]}
    if answers := counts.get("answers"):
        figures["ended"] = counts.get("ended", 0) / answers
    if judged := counts.get("judged"):
        figures["exact_match"] = counts["exact_matches"] / judged
    if "fine_tuned" in metrics:
        figures["validation_loss"] = metrics["fine_tuned"]["loss"]
        figures["perplexity"] = metrics["fine_tuned"]["perplexity"]
        figures["base_loss"] = metrics["base"]["loss"]
    return figures
