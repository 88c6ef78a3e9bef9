"""EleutherAI's lm-evaluation-harness on this machine: where it is, and which tasks it has.

It is large, so nobody has to install it, and it may be in an environment of its own. It runs as a
separate process (stages/backends/harness.py). Standard library only: make asks before it starts
anything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from stages.run.backend import choose
from stages.run.errors import InputError
from stages.run.fingerprint import ROOT
from stages.run.provenance import REQUIREMENTS
from stages.run.settings import Settings
from stages.run.task_names import task_names

PROGRAM = "lm_eval"
VERSION = "0.4.13"  # that was run with this project
# What lm_eval[hf] installs.
MODULES = ("lm_eval", "torch", "transformers", "accelerate")
_ASK = f"""
import json
from importlib.metadata import version
from importlib.util import find_spec
has_all = all(find_spec(name) for name in {MODULES!r})
where = has_all and [version("lm_eval"), find_spec("lm_eval").submodule_search_locations[0]]
print(json.dumps(where))
"""
# Where YAML files name a task, group or tag: `task: arc_easy`, or an item of a list of tags.
_NAMES = re.compile(
    r"""^(?:task|group|tag):[ \t]*["']?([\w.+-]+)|^[ \t]*-[ \t]*["']?([\w.+-]+)["']?[ \t]*$""",
    re.MULTILINE,
)


class Harness(NamedTuple):
    """The program's path. Its version and the folder of its tasks are empty and None where no
    Python is beside it, as for a script that starts a container."""

    program: str
    version: str
    tasks: Path | None


def find_harness() -> Harness | None:
    """The harness on the PATH, beside this Python, or in the project's environment."""
    folders = [Path(sys.executable).parent]
    if environment := os.environ.get("VENV", ".venv"):  # the Makefile's; empty: none
        folders.append(ROOT / environment / "bin")
    candidates = [shutil.which(PROGRAM), *(shutil.which(PROGRAM, path=str(f)) for f in folders)]
    found = (_asked(path) for path in dict.fromkeys(candidates) if path)
    return next((harness for harness in found if harness), None)


def require_harness(settings: Settings) -> Harness | None:
    """The harness where LM_EVAL names tasks, else None. Raises InputError where it cannot run
    them."""
    if not settings.lm_eval:
        return None
    harness = find_harness()
    problems = list(_problems(settings, harness))
    if problems or harness is None:
        raise InputError(problems)
    return harness


def harness_problems(settings: Settings) -> list[str]:
    """Why the tasks in LM_EVAL cannot be measured on this machine."""
    try:
        require_harness(settings)
    except InputError as error:
        return error.problems
    return []


def named_in(folder: Path) -> set[str]:
    """The tasks, groups and tags in the YAML files below `folder`. May hold words that are none of
    them, but misses none: the files are searched, not parsed (14,441 files in one second)."""
    names: set[str] = set()
    for path in folder.rglob("*yaml"):
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            names.update(name or item for name, item in _NAMES.findall(text))
    return names


def _problems(settings: Settings, harness: Harness | None) -> Iterator[str]:
    own = Path(settings.lm_eval_include_path) if settings.lm_eval_include_path else None
    if own and not own.is_dir():
        yield f"LM_EVAL_INCLUDE_PATH={own} is not a folder. Name one with the YAML files of tasks."
        own = None
    if harness is None:
        requirements = REQUIREMENTS[choose(settings).name]
        yield (
            "LM_EVAL: lm-evaluation-harness is not installed: .venv/bin/python -m pip install -r "
            f"{requirements} 'lm_eval[hf]=={VERSION}' adds it and keeps the pinned versions; or "
            "put the bin of another environment that has it first on the PATH."
        )
    elif harness.tasks:
        yield from _unknown(task_names(settings.lm_eval), [harness.tasks, *([own] if own else [])])


def _unknown(wanted: list[str], folders: Iterable[Path]) -> Iterator[str]:
    """A problem for each name that no YAML file has."""
    known = set().union(*map(named_in, folders))
    for name in wanted:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"`{PROGRAM} ls tasks` lists them."
            yield f"LM_EVAL: {name[:60]} is no task of lm-evaluation-harness. {hint}"


def _asked(program: str) -> Harness | None:
    """The harness that `program` starts; None where the Python beside it lacks its modules."""
    python = Path(program).resolve().with_name("python")
    if not python.exists():
        return Harness(program, "", None)
    done = subprocess.run([python, "-I", "-c", _ASK], capture_output=True, text=True)
    where = json.loads(done.stdout) if done.returncode == 0 else None
    return Harness(program, where[0], Path(where[1], "tasks")) if where else None
