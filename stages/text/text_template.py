"""A prompt's template as text with named parts: Dolly's, or that of the file PROMPT_TEMPLATE.

Standard library only, so that make can check the file before anything runs.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from stages.run.errors import InputError
from stages.run.settings import Settings

# The prompt of the Dolly tutorial.
DOLLY = """### Instruction
{instruction}

### Context
{context}

### Answer
{response}"""
PLAIN = "{instruction}{response}"  # for texts without a prompt: the model continues what is asked
PARTS = ("instruction", "context", "response")
_NAMED = re.compile(r"\{([A-Za-z_]\w*)\}")
_MOST_BYTES = 2**20


class Word(NamedTuple):
    """A literal text of a template, or the name of the part that comes in its place."""

    text: str
    is_part: bool


def words(template: str, has_context: bool) -> list[Word]:
    """The template up to its response. Without a context, the paragraphs that name it are left out
    (those that name another part too have nothing in its place)."""
    if not has_context:
        paragraphs = template.split("\n\n")
        kept = [one for one in paragraphs if set(_NAMED.findall(one)) != {"context"}]
        template = "\n\n".join(kept).replace("{context}", "")
    pieces = _NAMED.split(template.partition("{response}")[0])
    return [Word(text, bool(number % 2)) for number, text in enumerate(pieces) if text]


def read_template(path: str) -> str:
    """The template in the file PROMPT_TEMPLATE, without its last line ends; raises InputError with
    its problems."""
    text = _read("PROMPT_TEMPLATE", path).rstrip("\r\n")
    if problems := template_problems(text):
        raise InputError(f"PROMPT_TEMPLATE={path}: {problem}" for problem in problems)
    return text


def read_chat_template(path: str) -> str:
    """The text of the file CHAT_TEMPLATE; raises InputError where it cannot be read. Whether it is
    a template shows when it is rendered."""
    return _read("CHAT_TEMPLATE", path)


def _read(setting: str, path: str) -> str:
    try:
        if Path(path).stat().st_size > _MOST_BYTES:
            raise InputError(
                f"{setting}={path} has more than {_MOST_BYTES:,} bytes. Write a shorter one."
            )
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{setting}={path} cannot be read ({reason}). Name a text file.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{setting}={path} is not UTF-8 ({error.reason}). Save it as UTF-8."
        ) from None


def template_problems(template: str) -> list[str]:
    """Why a text cannot be a prompt's template."""
    names = _NAMED.findall(template)
    problems = []
    for name in dict.fromkeys(names):
        if name not in PARTS:
            near = get_close_matches(name, PARTS, n=1)
            hint = f" Did you mean {{{near[0]}}}?" if near else ""
            problems.append(
                f"{{{name}}} is no part of a prompt; {', '.join(f'{{{one}}}' for one in PARTS)} "
                f"are.{hint}"
            )
    problems += [
        f"it names {{{part}}} {names.count(part)} times. Write it once."
        for part in ("instruction", "response")
        if names.count(part) != 1
    ]
    if not problems and not template.endswith("{response}"):
        problems.append("text follows {response}, where an answer ends. Write {response} last.")
    return problems


def format_problems(settings: Settings) -> list[str]:
    """What is wrong with the settings of the prompt's format, and with the files that they name."""
    s, problems = settings, []
    for name, value, kind in (
        ("PROMPT_TEMPLATE", s.prompt_template, "file"),
        ("CHAT_TEMPLATE", s.chat_template, "chat"),
    ):
        if value and s.prompt_format not in ("auto", kind):
            problems.append(
                f"PROMPT_FORMAT={s.prompt_format} does not read {name}={value}. Set "
                f"PROMPT_FORMAT={kind}, or leave {name} out."
            )
    if s.prompt_format == "file" and not s.prompt_template:
        problems.append("PROMPT_FORMAT=file needs PROMPT_TEMPLATE. Name a file with the template.")
    if s.prompt_template and s.chat_template and s.prompt_format == "auto":
        problems.append("PROMPT_TEMPLATE and CHAT_TEMPLATE are both set. Leave one out.")
    try:
        if s.prompt_template:
            read_template(s.prompt_template)
        if s.chat_template:
            read_chat_template(s.chat_template)
    except InputError as error:
        problems += error.problems
    return problems
