"""The code that a stage runs, as one digest per file: what makes a stage stale when it is edited.

A stage runs its own script, everything which that imports from this project, and the backend's
modules that it asks for by name (`backend_module("train", ...)`) or starts as a process. Left out
are the modules in CANNOT_SHAPE_OUTPUT. Comments, docstrings, formatting, `print` statements and the
messages of errors do not change a digest. Standard library only.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

from stages.run.one_look import read_once

ROOT = Path(__file__).resolve().parents[2]

# Modules that decide whether, when and where a stage runs, or what it says, but never what it
# publishes. Everything else is fingerprinted, so a new module is, until it is listed here.
CANNOT_SHAPE_OUTPUT = frozenset(
    {
        # Settings: their values are part of the provenance, whatever the code that parsed them.
        "stages.run.recipe",
        "stages.run.settings",
        "stages.run.setting",
        "stages.run.cache_url",
        "stages.run.push_target",
        "stages.run.server_address",
        "stages.run.backend",  # the backend's name is part of the provenance too
        # Staleness and publishing: they compare and move what stages wrote.
        "stages.run.fingerprint",
        "stages.run.fsync",
        "stages.run.gates",
        "stages.run.task_names",
        "stages.run.lock",
        "stages.run.manifest",
        "stages.run.one_look",
        "stages.run.provenance",
        "stages.run.publish",
        # They copy what is published.
        "stages.push",
        "stages.model.card",
        "stages.model.card_answers",
        "stages.model.hub_write",
        "stages.model.lineage",
        "stages.model.push",
        "stages.text.push",
        # Processes, the terminal, what is said and refused, errors and cost.
        "stages.checks",
        "stages.backends.neuron.check",
        "stages.backends.neuron.parallel_sizes",
        "stages.backends.torch.check",
        "stages.model.fit",
        "stages.run.allocator",
        "stages.run.check_result",
        "stages.run.cli",
        "stages.run.contract",
        "stages.run.cost",
        "stages.run.disk",
        "stages.run.errors",
        # What a run will need: it is recorded beside what it took.
        "stages.forecast.accuracy",
        "stages.forecast.fits",
        "stages.forecast.machine",
        "stages.forecast.memory",
        "stages.forecast.minutes",
        "stages.forecast.parameters",
        "stages.forecast.planned",
        "stages.forecast.prices",
        "stages.forecast.trace",
        "stages.forecast.traced",
        "stages.plan",
        "stages.run.guard",
        "stages.run.harness",
        "stages.run.launch",
        "stages.run.limits",
        "stages.run.machines",
        "stages.run.progress",
        "stages.model.notes",
        "stages.track.check",
        "stages.track.follow",
        "stages.track.libraries",
        # What is counted in the data, for its manifest and the page: the sequences are the same.
        "stages.text.data_notes",
        "stages.text.repeats",
        "stages.text.sensitive",
        # Programs that run no stage, and what only mypy reads.
        "stages.backends.conformance",
        "stages.backends.neuron.cache_cli",
        "stages.backends.neuron.doctor",
        "stages.backends.neuron.serve",
        "stages.backends.next_token",
        "stages.backends.torch.doctor",
        "stages.backends.torch.serve",
        "stages.chat",
        "stages.doctor",
        "stages.machine",
        "stages.page.facts",
        "stages.page.notes",
        "stages.page.plots",
        "stages.page.render",
        "stages.page.serve",
        "stages.report",
        "stages.rehearse",
        "stages.backends.band",
        "stages.backends.record",
        "stages.model.cut",
        "stages.run.server",
        "stages.serve",
        "stages.watch",
        "stages.serve_check",
        "stages.text.chat_client",
        "stages.text.served_answers",
        "stages.make.adopt",
        "stages.make.help",
        "stages.make.history",
        "stages.make.install",
        "stages.make.results",
        "stages.make.stale",
        "stages.make.status",
        "stages.make.verify",
    }
)
# Errors whose messages may be reworded without running anything again.
_ERRORS = ("InputError", "StageFailure")


@read_once
def raw_digest(path: str) -> str:
    """SHA-256 of the bytes of a file of the project; "" where it does not exist."""
    try:
        return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()
    except OSError:
        return ""


def code_of(stage: str, backend: str) -> dict[str, str]:
    """Path -> digest for every file of the project that `stage` runs on `backend`."""
    pending = [f"stages/{stage.replace('-', '_')}.py"]
    digests: dict[str, str] = {}
    while pending:
        path = pending.pop()
        if path in digests or not (ROOT / path).is_file():
            continue
        tree = ast.parse((ROOT / path).read_bytes())
        digests[path] = hashlib.sha256(_meaning(tree).encode()).hexdigest()
        pending += _modules_used(tree, backend)
    return dict(sorted(digests.items()))


def _modules_used(tree: ast.Module, backend: str) -> list[str]:
    """Paths of the project's modules that a file imports, asks a backend for, or starts."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from stages.text import packing` names a module, `from stages.text.packing import
            # best_fit` something in one.
            names += [node.module] + [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            names += [name.name for name in node.names]
        elif isinstance(node, ast.Call) and _called(node) == "backend_module":
            names.append(f"stages.backends.{backend}.{ast.literal_eval(node.args[0])}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # A module that is started as a process: `python -m stages.backends.torch.worker`.
            names += [node.value] if node.value.startswith("stages.") else []
    return [
        name.replace(".", "/") + ".py"
        for name in names
        if name.startswith("stages.") and name not in CANNOT_SHAPE_OUTPUT
    ]


def _meaning(node: object) -> str:
    """A syntax tree as text, the same on every Python from 3.10 on: without positions, docstrings,
    empty fields, and what is only said to the user."""
    if isinstance(node, ast.Raise) and _called(node.exc) in _ERRORS:
        return f"Raise({_called(node.exc)})"
    if isinstance(node, ast.AST):
        # Empty fields, and fields that only some versions of Python have, carry no meaning.
        fields = [
            f"{name}={_meaning(value)}"
            for name, value in ast.iter_fields(node)
            if value not in (None, []) and name not in ("kind", "type_ignores")
        ]
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(_meaning(item) for item in node if not _is_said_only(item))}]"
    return repr(node)


def _is_said_only(statement: object) -> bool:
    """Whether a statement does nothing but state a string (a docstring) or print."""
    if not isinstance(statement, ast.Expr):
        return False
    value = statement.value
    is_string = isinstance(value, ast.Constant) and isinstance(value.value, str)
    return is_string or _called(value) == "print"


def _called(node: object) -> str:
    """The name of the function that `node` calls; "" where it is no call of a plain name."""
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return node.func.id if is_call else ""  # type: ignore[attr-defined]
