"""A recipe: a file `recipes/NAME.mk` of settings, `SETTING ?= value` on each line.

Recipes are data: nothing in one is expanded or run. `#` starts a comment. Standard library only.
"""

from __future__ import annotations

import re
from pathlib import Path

from stages.run.errors import InputError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
_LINE = re.compile(r"([A-Za-z_]\w*)[ \t]*\?=[ \t]*(.*)", re.ASCII)
_MAX_BYTES = 2**16  # all settings together have to fit one command (128 KiB on Linux)


def read_recipe(name: str, folder: Path = RECIPES) -> dict[str, tuple[str, str]]:
    """Setting -> value as text, and its place ("recipes/demo.mk, line 3"), of recipe `name`.

    Raises InputError for a recipe that does not exist, and with every line that is no setting.
    """
    path = folder / f"{name}.mk"
    # The name becomes a path: compare it with those that exist instead of looking it up.
    names = sorted(file.stem for file in folder.glob("*.mk"))
    if name not in names:
        raise InputError(f"RECIPE={name[:60]!r} does not exist. There are: {', '.join(names)}.")
    values: dict[str, tuple[str, str]] = {}
    problems = []
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise InputError(f"{_shown(path)} has {size:,} bytes. A recipe has at most {_MAX_BYTES:,}.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{_shown(path)} cannot be read: {error}.") from None
    for number, line in enumerate(lines, start=1):
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        match = _LINE.fullmatch(text)
        place = f"{_shown(path)}, line {number}"
        if match:
            values[match[1]] = match[2], place
        elif text:
            problems.append(f"{place}: {text[:60]!r} sets nothing. Write SETTING ?= value.")
    if problems:
        raise InputError(problems)
    return values


def _shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
