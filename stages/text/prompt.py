"""The prompt's text, built here for training and for answering.

The data stage saves the template next to its sequences and the later stages copy it, so a model is
asked with the words that it was trained on. Standard library only: eval imports this at start.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from stages.run.errors import InputError
from stages.run.layout import PROMPT_FILE


@dataclass(frozen=True)
class PromptTemplate:
    """Headers of a prompt's parts and the separator between them. The defaults are those of the
    Dolly tutorial."""

    instruction: str = "### Instruction\n"
    context: str = "### Context\n"
    response: str = "### Answer\n"
    separator: str = "\n\n"

    def prompt(self, instruction: str, context: str = "") -> str:
        """The text before the answer, which ends with the answer's header. A context of only white
        space is left out."""
        parts = [self.instruction + instruction]
        if context and not context.isspace():
            parts.append(self.context + context)
        return self.separator.join([*parts, self.response])

    def text(self, instruction: str, context: str, response: str) -> str:
        """The text of an example's document, without BOS and EOS."""
        return self.prompt(instruction, context) + response

    def save(self, path: Path) -> None:
        """Write the template to `path`, or to prompt.json when `path` is a folder."""
        _file(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> PromptTemplate:
        """The template saved at `path` (a file, or a folder with prompt.json); raises InputError
        when it is not one."""
        file = _file(path)
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"{file}: the prompt template cannot be read ({error}). Run the data stage again."
            ) from None
        names = {f.name for f in fields(cls)}
        if (
            not isinstance(saved, dict)
            or set(saved) != names
            or not all(isinstance(text, str) for text in saved.values())
        ):
            raise InputError(
                f"{file} is not a prompt template: it must hold the texts "
                f"{', '.join(sorted(names))} and nothing else."
            )
        return cls(**saved)


def _file(path: Path) -> Path:
    return path / PROMPT_FILE if path.is_dir() else path
