"""GATES: what eval's figures must reach, such as `validation_loss<2.0 exact_match>0.5 ended>0.9`,
or for a task of LM_EVAL `arc_easy/acc>0.5`.

Standard library only: make reads the setting at every start.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from stages.run.errors import InputError
from stages.run.task_names import task_names

# What a gate may name, and where eval's metrics have it.
FIGURES = {
    "validation_loss": "loss of the fine-tuned model on the held-out sequences, or on EVAL_SET",
    "base_loss": "loss of the base model on them",
    "perplexity": "perplexity of the fine-tuned model on them",
    "exact_match": "share of the answers to EVAL_SET, or else PROMPTS, that are as expected",
    "ended": "share of those answers that the model ended itself",
}
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_NUMBER = r"(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
# TASK/METRIC may have a filter: gsm8k/exact_match,strict-match
_GATE = re.compile(rf"(\w+|\w[\w.+-]*/\w[\w.,+-]*)(<=|>=|<|>){_NUMBER}", re.ASCII)


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
        elif match[1] not in FIGURES and "/" not in match[1]:
            near = get_close_matches(match[1], FIGURES, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            problems.append(f"{match[1][:60]} is none of {', '.join(FIGURES)}, TASK/METRIC.{hint}")
        else:
            gates.append(Gate(match[1], match[2], float(match[3])))
    if problems:
        raise InputError(problems)
    return gates


def unnamed_tasks(text: str, tasks: str) -> list[str]:
    """A problem for each gate on a task that LM_EVAL (`tasks`) does not name."""
    named = task_names(tasks)
    figures = [gate.figure for gate in parse_gates(text)]
    unnamed = {figure: figure.partition("/")[0] for figure in figures if "/" in figure}
    return [
        f"GATES: {figure}: LM_EVAL does not name {task}. Set LM_EVAL={','.join([*named, task])}."
        for figure, task in unnamed.items()
        if task not in named
    ]


def unasked_answers(text: str, eval_set: str, compare_answers: int) -> list[str]:
    """A problem where gates are on the answers to EVAL_SET, and COMPARE_ANSWERS asks for none."""
    figures = {gate.figure for gate in parse_gates(text)} & {"exact_match", "ended"}
    if not figures or not eval_set or compare_answers:
        return []
    return [
        f"GATES: {' and '.join(sorted(figures))}: of the answers to EVAL_SET={eval_set}, and "
        "COMPARE_ANSWERS=0 asks for none. Raise it, or leave the gate out."
    ]


def gate_problems(text: str, metrics: Mapping[str, Any]) -> list[str]:
    """Each gate that eval's metrics do not pass, with the figure."""
    problems = []
    figures = _figures(metrics)
    for gate in parse_gates(text):
        value = figures.get(gate.figure)
        shown = f"{gate.figure}{gate.sign}{gate.bound:g}"
        if value is None:
            problems.append(f"GATES: {shown}: eval has not measured {_meaning(gate, figures)}.")
        elif not _COMPARE[gate.sign](value, gate.bound):
            problems.append(f"GATES: {shown}: {gate.figure} is {value:.4g}.")
    return problems


def _meaning(gate: Gate, figures: Mapping[str, float]) -> str:
    """What a figure that was not measured means; for a task's, also what was measured of it."""
    if gate.figure in FIGURES:
        return FIGURES[gate.figure]
    task = gate.figure.partition("/")[0]
    others = [name for name in figures if name.startswith(f"{task}/")]
    return f"it, but {', '.join(others)}" if others else "it"


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    figures: dict[str, float] = {}
    counts = metrics
    if (compared := metrics.get("comparison", {})).get("set") == "EVAL_SET":
        counts = {**compared, **compared.get("fine_tuned", {}), "answers": compared["questions"]}
    if answers := counts.get("answers"):
        figures["ended"] = counts.get("ended", 0) / answers
    if judged := counts.get("judged"):
        figures["exact_match"] = counts["exact_matches"] / judged
    if "fine_tuned" in metrics:
        figures["validation_loss"] = metrics["fine_tuned"]["loss"]
        figures["perplexity"] = metrics["fine_tuned"]["perplexity"]
        figures["base_loss"] = metrics["base"]["loss"]
    for task, facts in metrics.get("lm_eval", {}).get("tasks", {}).items():
        for metric, measured in facts["metrics"].items():
            if measured["fine_tuned"] is not None:
                figures[f"{task}/{metric}"] = measured["fine_tuned"]
    return figures
