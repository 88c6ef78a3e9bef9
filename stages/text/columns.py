"""Which columns of a dataset hold an example: named by settings, or found by the names that
datasets usually have. Standard library only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from stages.run.errors import InputError, refuse
from stages.run.layout import SEQUENCE_COLUMNS
from stages.run.settings import Settings

AUTO = "auto"
# The usual names of each part, in lower case. Capitalised and in capitals they are found too.
USUAL = {
    "messages": ("messages", "conversations", "conversation"),
    "instruction": ("instruction", "prompt", "question"),
    "context": ("context", "input"),
    "response": ("response", "output", "completion", "answer"),
}
# The instructions and responses that belong together: Dolly's, Alpaca's and others'.
_PAIRS = (
    *(("instruction", "response"), ("instruction", "output")),
    *(("prompt", "completion"), ("question", "answer")),
)
_TEXT = ("text",)  # alone: documents without a prompt


@dataclass(frozen=True)
class Columns:
    """The columns of an example: `messages`, or the others. "" is for none and AUTO for one that
    has yet to be found; with neither messages nor instruction, `response` is a text alone."""

    instruction: str = AUTO
    context: str = AUTO
    response: str = AUTO
    messages: str = AUTO

    @property
    def wanted(self) -> set[str]:
        """Every name that may be one of them."""
        names: set[str] = set()
        for part, usual in USUAL.items():
            name = getattr(self, part)
            names |= {*spellings(usual)} if name == AUTO else {name}
        return (names | {*spellings(_TEXT)}) - {""}

    @property
    def named(self) -> list[str]:
        parts = (self.messages, self.instruction, self.context, self.response)
        return [name for name in parts if name]

    def describe(self) -> str:
        """What is read, as a phrase."""
        if self.messages:
            return f"conversations in {self.messages!r}"
        if not self.instruction:
            return f"texts without a prompt in {self.response!r}"
        context = f", context in {self.context!r}" if self.context else ""
        response = f", response in {self.response!r}" if self.response else ""
        return f"instruction in {self.instruction!r}{context}{response}"


def columns_of(settings: Settings) -> Columns:
    """The columns that the settings name."""
    s = settings
    return Columns(s.instruction_column, s.context_column, s.response_column, s.messages_column)


def find_columns(
    place: str, existing: Sequence[str], columns: Columns, answered: bool = True
) -> Columns:
    """`columns` with those that were AUTO found among the `existing` names.

    Conversations come first, then an instruction with its response, then text alone. `answered`: a
    response is required. Raises InputError for columns that do not exist, and where the usual names
    leave a choice. `place` names the dataset, file or line in messages.
    """
    if set(SEQUENCE_COLUMNS) <= set(existing) and not set(existing) & columns.wanted:
        raise InputError(
            f"{place} holds packed sequences, which a data stage published, and no examples. Set "
            "DATASET to what it was made from."
        )
    refuse(_named_problems(place, existing, columns))
    if columns.messages != AUTO or columns.instruction == columns.response == AUTO:
        if messages := _find(place, existing, columns, "messages"):
            return Columns("", "", "", messages)
        if pair := _usual_pair(place, existing):
            columns = replace(columns, instruction=pair[0], response=pair[1])
    instruction = _find(place, existing, columns, "instruction")
    response = _find(place, existing, columns, "response")
    text = next((name for name in spellings(_TEXT) if name in existing), "")
    if text and columns.instruction == AUTO and not instruction and not response:
        return Columns("", "", text, "") if answered else Columns(text, "", "", "")
    missing = [("instruction", instruction or columns.instruction == "")]
    missing += [("response", response or not answered)]
    refuse([_unfound(place, existing, part) for part, found in missing if not found])
    context = _find(place, existing, columns, "context") if instruction else ""
    return Columns(instruction, context if context != instruction else "", response, "")


def _usual_pair(place: str, existing: Sequence[str]) -> tuple[str, str] | None:
    """The instruction and the response where both have names that belong together; the project's
    own names before others."""
    pairs = [
        (one, other)
        for names in _PAIRS
        for one, other in zip(*map(spellings, ((name,) for name in names)), strict=True)
        if one in existing and other in existing
    ]
    if len(pairs) > 1 and pairs[0][0].lower() != USUAL["instruction"][0]:
        shown = " or ".join(f"{one!r} with {other!r}" for one, other in pairs)
        raise InputError(
            f"{place}: the instruction and the response may be {shown}. Set INSTRUCTION_COLUMN and "
            "RESPONSE_COLUMN."
        )
    return pairs[0] if pairs else None


def _find(place: str, existing: Sequence[str], columns: Columns, part: str) -> str:
    """The column of a part: the one that `columns` names, or that has a usual name; "" for none."""
    if (name := getattr(columns, part)) != AUTO:
        return str(name)
    found = [one for one in dict.fromkeys(existing) if one in spellings(USUAL[part])]
    if len(found) > 1:
        raise InputError(
            f"{place}: any of {', '.join(map(repr, found))} may be the {part}. Set "
            f"{part.upper()}_COLUMN to one of them."
        )
    return found[0] if found else ""


def _named_problems(place: str, existing: Sequence[str], columns: Columns) -> list[str]:
    """A problem for each column that a setting names and that does not exist, and for each that
    exists twice."""
    problems = []
    for part in USUAL:
        name = getattr(columns, part)
        if name not in ("", AUTO, *existing):
            near = get_close_matches(name, existing, n=1)
            hint = f" Did you mean {near[0][:60]!r}?" if near else ""
            none = ", or to nothing if there is none" if part == "context" else ""
            problems.append(
                f"{place}: there is no column {name!r}; {_shown(existing)}.{hint} Set "
                f"{part.upper()}_COLUMN to its name{none}."
            )
    problems += [
        f"{place}: {existing.count(name)} columns are called {name!r}. Rename all but one."
        for name in dict.fromkeys(existing)
        if name in columns.wanted and existing.count(name) > 1
    ]
    return problems


def _unfound(place: str, existing: Sequence[str], part: str) -> str:
    near = [match for one in USUAL[part] for match in get_close_matches(one, existing, n=1)]
    hint = f" Did you mean {near[0][:60]!r}?" if near else ""
    return (
        f"{place}: there is no column for the {part} ({', '.join(USUAL[part])}), and none of "
        f"conversations ({', '.join(USUAL['messages'])}); {_shown(existing)}.{hint} Set "
        f"{part.upper()}_COLUMN or MESSAGES_COLUMN to its name."
    )


def _shown(existing: Sequence[str]) -> str:
    if not existing:
        return "it has no columns"
    return f"it has {', '.join(repr(name[:60]) for name in existing[:20])}"


def spellings(names: Collection[str]) -> tuple[str, ...]:
    """The names as they are, capitalised and in capitals."""
    return tuple(spelling for name in names for spelling in (name, name.capitalize(), name.upper()))
