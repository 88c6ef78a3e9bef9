"""LM_EVAL: names of lm-evaluation-harness's tasks. Standard library only: make reads it at every
start."""

from __future__ import annotations

import re

from stages.run.errors import InputError

_NAME = re.compile(r"\w[\w.+-]*", re.ASCII)


def task_names(text: str) -> list[str]:
    """The names in `arc_easy,hellaswag`; raises InputError for what is none."""
    names = text.replace(",", " ").split()
    problems = [
        f"{name[:60]!r} is no name of a task. Write names as in arc_easy,hellaswag; a task of your "
        "own is a YAML file in the folder that LM_EVAL_INCLUDE_PATH names."
        for name in names
        if not _NAME.fullmatch(name) or name.endswith((".yaml", ".yml"))
    ]
    problems += [
        f"{name[:60]} is named more than once. Name it once."
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if problems:
        raise InputError(problems)
    return names
