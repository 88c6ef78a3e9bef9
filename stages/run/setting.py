"""One setting: how it is declared, named, and parsed. `Settings` is the list of all.

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import Field, field
from difflib import get_close_matches
from typing import Any

from stages.run.errors import InputError

STAGES = ("data", "precompile", "train", "consolidate", "compile-inference", "eval")
# The upper bound of whole numbers without one: what seeds and 32-bit positions can hold.
MOST_WHOLE = 2**31 - 1
# The limits of a path and of each name in it on Linux; beyond them every access is an OSError.
_PATH_BYTES, _NAME_BYTES = 4095, 255


def setting(
    default: Any,
    help: str,
    stages: str = "",
    *,
    unit: str = "",
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    path: bool = False,
    check: Callable[[str], object] | None = None,
    on_or_off: str = "",
    may_be_empty: bool = False,
) -> Any:
    """A field of `Settings`. `stages` names those whose output it changes; "" is for none.
    `on_or_off` names those that change only between 0 and any other value.

    `least` and `most` are inclusive bounds (MOST_WHOLE where a whole number has no `most`), `above`
    and `below` exclusive ones. `path` marks a value that may name a local file or folder: its
    content, not its name, then makes a stage stale. `may_be_empty`: the empty text has a meaning.
    `check` raises InputError for a bad value.
    """
    unknown = {*stages.split(), *on_or_off.split()} - set(STAGES)
    assert not unknown, f"not stages: {unknown}"
    facts = {
        "help": help,
        "stages": tuple(stages.split()),
        "on_or_off": tuple(on_or_off.split()),
        "unit": unit,
        "choices": choices,
        "path": path,
        "check": check,
        "may_be_empty": may_be_empty,
    }
    return field(
        default=default,
        metadata={**facts, "least": least, "most": most, "above": above, "below": below},
    )


def variable(f: Field[Any]) -> str:
    """The make and environment variable of a setting's field."""
    return f.name.upper()


def kind(f: Field[Any]) -> str:
    """The name of a setting's type: int, float, bool or str."""
    return f.type if isinstance(f.type, str) else f.type.__name__


def as_text(value: Any) -> str:
    """A setting's value as `parse` reads it."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def parse(f: Field[Any], text: str) -> Any:
    """The value of a setting from its text; InputError for a wrong type or a broken bound."""
    name, facts = variable(f), f.metadata
    shown = text if len(text) <= 60 else f"{text[:60]}... ({len(text)} characters)"
    if "\0" in text:
        raise InputError(f"{name} contains a NUL character. Remove it.")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InputError(f"{name}={shown!r} is not UTF-8. Write it in UTF-8.") from None
    if facts["path"] and (
        size > _PATH_BYTES or any(len(part.encode()) > _NAME_BYTES for part in text.split("/"))
    ):
        raise InputError(
            f"{name}={shown!r} is too long: a path has at most {_PATH_BYTES:,} bytes, each name "
            f"in it {_NAME_BYTES}."
        )
    if kind(f) == "str":
        if facts["choices"] and text not in facts["choices"]:
            near = get_close_matches(text, facts["choices"], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InputError(f"{name}={shown!r} is none of {', '.join(facts['choices'])}.{hint}")
        if (
            f.default != ""
            and not (text.strip() if facts["path"] else text)
            and not facts["may_be_empty"]
        ):
            raise InputError(f"{name} is empty. Leave it out for the default, {f.default}.")
        if facts["check"]:
            try:
                facts["check"](text)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
        return text
    if kind(f) == "bool":
        known = {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }
        if text.strip().lower() not in known:
            raise InputError(f"{name}={shown!r} is neither 1 nor 0.")
        return known[text.strip().lower()]
    return _number(f, text, shown)


def _number(f: Field[Any], text: str, shown: str) -> int | float:
    name, facts = variable(f), f.metadata
    what = "a whole number" if kind(f) == "int" else "a number"
    try:
        value = int(text) if kind(f) == "int" else float(text)
    except ValueError:
        raise InputError(f"{name}={shown!r} is not {what}.") from None
    most = MOST_WHOLE if kind(f) == "int" and facts["most"] is None else facts["most"]
    bounds = {
        "at least": (facts["least"], lambda bound: value >= bound),
        "at most": (most, lambda bound: value <= bound),
        "above": (facts["above"], lambda bound: value > bound),
        "below": (facts["below"], lambda bound: value < bound),
    }
    broken = [
        f"{word} {bound:,}"
        for word, (bound, holds) in bounds.items()
        if bound is not None and not holds(bound)
    ]
    if broken or not math.isfinite(value):
        unit = f" {facts['unit']}" if facts["unit"] else ""
        raise InputError(
            f"{name}={shown.strip()}{unit} must be {' and '.join(broken) or 'finite'}. "
            f"{facts['help']}"
        )
    return value
