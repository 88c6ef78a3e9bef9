"""The code that a stage runs, as one digest per file that comments, docstrings and formatting do not change.

A stage runs its own script, what that imports from this project, and the backend's modules that it asks for by name
(`backend_module("train", ...)`). `stages/run` is left out: it decides when and where a stage runs, never what it makes.
Standard library only.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def raw_digest(path: str) -> str:
    """sha256 of a file of the project, as it lies there; "" when it is gone."""
    try:
        return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()
    except OSError:
        return ""


def code_of(stage: str, backend: str) -> dict[str, str]:
    """Path -> digest of meaning, for every file of the project that `stage` runs on `backend`."""
    todo, found = [f"stages/{stage.replace('-', '_')}.py"], {}
    while todo:
        path = todo.pop()
        if path in found or not (ROOT / path).is_file():
            continue
        tree = ast.parse((ROOT / path).read_bytes())
        found[path] = hashlib.sha256(_meaning(tree).encode()).hexdigest()
        todo += _modules_asked_for(tree, backend)
    return dict(sorted(found.items()))


def _modules_asked_for(tree: ast.Module, backend: str) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from stages.text import packing` names a module, `from stages.text.packing import best_fit` lies in one.
            names += [node.module] + [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            names += [name.name for name in node.names]
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", "") == "backend_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            names.append(f"stages.backends.{backend}.{node.args[0].value!s}")
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("stages.backends.")
        ):
            names.append(
                node.value
            )  # a module that is started as a process: `python -m stages.backends.torch.worker`
    ours = [
        name for name in names if name.startswith("stages.") and not name.startswith("stages.run")
    ]
    return [name.replace(".", "/") + ".py" for name in ours]


def _meaning(node: object) -> str:
    """A syntax tree as text, the same on every Python from 3.10: no positions, docstrings or empty fields."""
    if isinstance(node, ast.AST):
        # Fields that are empty, or that some Pythons have and others not, say nothing.
        said = [
            (name, value)
            for name, value in ast.iter_fields(node)
            if value not in (None, []) and name not in ("kind", "type_ignores")
        ]
        return f"{type(node).__name__}({','.join(f'{name}={_meaning(value)}' for name, value in said)})"
    if isinstance(node, list):
        return f"[{','.join(_meaning(item) for item in node if not _is_docstring(item))}]"
    return repr(node)


def _is_docstring(statement: object) -> bool:
    """A string that stands alone as a statement does nothing, wherever it stands."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
