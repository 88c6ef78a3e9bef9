"""`make help`: the targets that the Makefile documents, and every setting with value and stages.

python3 -I -S stages/make/help.py Makefile      prints what `make help` prints
python3 -I -S stages/make/help.py --docs        writes the table of settings in docs/settings.md
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stages.run.setting import variable
from stages.run.settings import Settings, with_recipe


def targets(makefile: Path) -> list[tuple[str, str]]:
    """Target and description of each rule line that ends in `## description`."""
    return re.findall(
        r"^([a-z-]+):[^#\n]*## (.+)$", makefile.read_text(encoding="utf-8"), re.MULTILINE
    )


def with_settings(page: str) -> str:
    """A page of the docs with today's table of settings between its two marks."""
    head, rest = page.split("<!-- settings -->\n")
    tail = rest.split("<!-- end of settings -->")[1]
    return f"{head}<!-- settings -->\n{markdown()}\n<!-- end of settings -->{tail}"


def settings_table(given: Mapping[str, str]) -> list[tuple[str, str, str, str]]:
    """Name, value (given or default), help with unit and choices, and the stages affected."""
    rows = []
    for f in fields(Settings):
        default = str(int(f.default)) if isinstance(f.default, bool) else str(f.default)
        facts = f.metadata
        about = facts["help"]
        if facts["choices"]:
            about += f" One of {', '.join(facts['choices'])}."
        if facts["unit"]:
            about += f" [{facts['unit']}]"
        stages = " ".join(facts["stages"])
        if facts["on_or_off"]:
            stages += f"; {' '.join(facts['on_or_off'])} if it becomes 0 or was 0"
        rows.append((variable(f), given.get(variable(f), default), about, stages))
    return rows


def markdown() -> str:
    """The settings with their defaults as a Markdown table."""
    lines = ["| Setting | Default | What it is | Changing it re-runs |", "|---|---|---|---|"]
    for name, value, about, stages in settings_table({}):
        shown = f"`{value}`" if value else ""
        lines.append(
            f"| `{name}` | {shown} | {about.replace('|', chr(92) + '|')} | {stages or 'nothing'} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if arguments == ["--docs"]:
        page = Path("docs/settings.md")
        page.write_text(with_settings(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    print("Usage: make TARGET [RECIPE=demo] [SETTING=value ...]\n\nTargets")
    for name, about in targets(Path(arguments[0])):
        print(f"  {name:<18} {about}")
    recipes = ", ".join(sorted(path.stem for path in Path("recipes").glob("*.mk")))
    print(
        f"\nRECIPE  a list of settings: {recipes}\n"
        "RUN     the folder in outputs/ that stages publish to (default: the recipe)\n"
    )
    print("Settings (value now -> the stages that a change re-runs)")
    for name, value, about, stages in settings_table(with_recipe(os.environ)):
        print(f"  {name}={value[:60]}\n      {about} -> {stages or 'nothing'}")


if __name__ == "__main__":
    main(sys.argv[1:])
