"""A conversation that a chat template renders, in parts: the template's own texts, and those of
the messages as the template writes them.

A part is [literal, -1] for the template's own text and [text, number] for the content of message
`number`. Imports transformers, so only the process of `render` imports this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from stages.text.conversation import text_fault

# A template adds some words to a message, not pages.
_MOST_ADDED = 2**16
_FIELDS = ("content", "reasoning_content")
# Stands for a text, to see where the template puts it.
_MARK = re.compile("\ue000([0-9]+)([01])\ue001")

Part = list[Any]  # [text, message]
Asked = dict[int, "str | Exception"]  # message -> its prompt, or why there is none
Messages = list[dict[str, Any]]


class Refused(Exception):
    """Why a conversation cannot be rendered."""


class Renderer:
    """One template with the special tokens that it may name. `dates`: format -> text of the dates
    that it has asked for."""

    def __init__(self, template: str, tokens: dict[str, str]):
        self._template, self._tokens = template, tokens
        self.dates: dict[str, str] = {}
        self._skeletons: dict[str, list[str]] = {}
        now = datetime.now()
        # The first date of a format is kept: midnight changes nothing.
        self._date = lambda format: self.dates.setdefault(format, now.strftime(format))

    def render(self, messages: Messages, ask: bool = False) -> str:
        """The text of `messages`; `ask`: with the beginning of an answer."""
        given: dict[str, Any] = {**self._tokens, "strftime_now": self._date}
        rendered: Any = render_jinja_template(
            [messages], chat_template=self._template, add_generation_prompt=ask, **given
        )
        [text], _ = rendered
        room = sum(len(str(value)) for message in messages for value in message.values())
        if len(text) > 4 * room + _MOST_ADDED * (1 + len(messages)):
            raise Refused(f"makes {len(text):,} characters of {room:,}")
        if fault := text_fault(text):
            raise Refused(f"writes what {fault}")
        return str(text)

    def prompt(self, messages: Messages) -> dict[str, Any]:
        """The prompt for an answer to `messages`, as a document without answers."""
        _, parts = self._ask(messages)
        starts = _starts(parts, self._asked(messages))
        return {"parts": parts, "starts": [*starts.values()], "answers": [], "numbers": []}

    def documents(
        self, messages: Messages, answers: list[int], alone: bool
    ) -> list[dict[str, Any]]:
        """A document of the conversation, or one for each of its `answers` (numbers of messages)
        where the whole cannot be one (the template writes earlier answers in other words) or is not
        wanted (`alone`)."""
        asked, reason = self._asked(messages), None
        for way in [] if alone else _ways(messages):
            try:
                return [self._document(way, asked, answers)]
            except Refused as refused:
                reason = reason or refused
        for way in _ways(messages) if alone or len(answers) > 1 else []:
            try:
                return [self._document(way[: at + 1], asked, [at], alone=True) for at in answers]
            except Refused as refused:
                reason = reason or refused
        assert reason
        raise reason

    def _document(
        self, messages: Messages, asked: Asked, answers: list[int], alone: bool = False
    ) -> dict[str, Any]:
        """A document as its parts, and the numbers of those that begin a message of the assistant
        (`starts`), and one of `answers`, which are the messages `numbers`. `alone`: earlier
        thinking may be missing, because it has documents of its own."""
        text = self.render(messages)
        parts = self._parts(messages, text, ask=False, whole=not alone)
        for number in answers:
            prompt = asked[number]
            if isinstance(prompt, Exception):
                raise prompt
            if not text.startswith(prompt):
                raise Refused(
                    f"writes what comes before message {number + 1} in other words once that "
                    "message is there, so that the model would be asked in other words than it is "
                    "trained on"
                )
        starts = _starts(parts, asked)
        if missing := [number for number in answers if number not in starts]:
            raise Refused(f"begins the answer of message {missing[0] + 1} within a message")
        return {
            "parts": parts,
            "starts": [*starts.values()],
            "answers": [starts[number] for number in answers],
            "numbers": answers,
        }

    def _ask(self, messages: Messages) -> tuple[str, list[Part]]:
        """The text and the parts of the prompt for an answer to `messages`."""
        reason = None
        for way in _ways(messages):
            try:
                text = self.render(way, ask=True)
                return text, self._parts(way, text, ask=True, whole=False)
            except Refused as refused:
                reason = reason or refused
        assert reason
        raise reason

    def _asked(self, messages: Messages) -> Asked:
        """The text of the prompt for each message of the assistant; or why it cannot be asked."""
        asked: Asked = {}
        for number, message in enumerate(messages):
            if number and message["role"] == "assistant":
                try:
                    asked[number] = self._ask(messages[:number])[0]
                except Exception as error:  # a template raises anything
                    asked[number] = error
        return asked

    def _parts(self, messages: Messages, text: str, ask: bool, whole: bool) -> list[Part]:
        """The rendered text as parts. Every message must be in it; `whole`: its thinking too."""
        skeleton = self._skeleton(messages, ask)
        literals, marks = skeleton[::3], list(zip(skeleton[1::3], skeleton[2::3], strict=True))
        at, parts = len(literals[0]), [[literals[0], -1]]
        if not text.startswith(literals[0]):
            raise Refused("begins with other words than for other texts")
        for (digits, field), literal in zip(marks, literals[1:], strict=True):
            number = int(digits)
            written = _written(messages[number][_FIELDS[int(field)]], text, at, literal)
            if written is None:
                raise Refused(f"changes the text of message {number + 1}")
            parts += [[written, number], [literal, -1]]
            at += len(written) + len(literal)
        if at != len(text):
            raise Refused("ends with other words than for other texts")
        seen = {(int(digits), int(field)) for digits, field in marks}
        for number, message in enumerate(messages):
            for index, name in enumerate(_FIELDS):
                needed = whole or index == 0 or number == len(messages) - 1
                if needed and message.get(name) and (number, index) not in seen:
                    what = "the thinking of message" if index else "message"
                    raise Refused(f"leaves out {what} {number + 1} ({message['role']})")
        return parts

    def _skeleton(self, messages: Messages, ask: bool) -> list[str]:
        """What the template puts around the texts of such messages, split at the marks that stand
        for them."""
        marked = [
            {
                **message,
                **{
                    name: f"\ue000{number}{field}\ue001"
                    for field, name in enumerate(_FIELDS)
                    if message.get(name)
                },
            }
            for number, message in enumerate(messages)
        ]
        key = json.dumps([ask, marked])
        if key not in self._skeletons:
            if len(self._skeletons) > 1000:  # tool calls make many
                self._skeletons.clear()
            skeleton = _MARK.split(self.render(marked, ask))
            self._require_calls(marked, ask, skeleton)
            self._skeletons[key] = skeleton
        return self._skeletons[key]

    def _require_calls(self, marked: Messages, ask: bool, skeleton: list[str]) -> None:
        """Raise Refused where the template does not write the tool calls of a message."""
        for number, message in enumerate(marked):
            if message.get("tool_calls"):
                without = [*marked]
                without[number] = {k: v for k, v in message.items() if k != "tool_calls"}
                if _MARK.split(self.render(without, ask)) == skeleton:
                    raise Refused(f"leaves out the tool calls of message {number + 1}")


def _written(content: str, text: str, at: int, following: str) -> str | None:
    """The content as the template writes it at `text[at:]`, before the words `following`; None
    where it writes something else."""
    strips: tuple[Callable[[str], str], ...] = (
        str,
        str.strip,
        str.lstrip,
        str.rstrip,
        lambda one: one.strip("\n"),
        lambda one: one.lstrip("\n"),
        lambda one: one.rstrip("\n"),
        lambda one: json.dumps(one, ensure_ascii=False)[1:-1],
    )
    for strip in strips:
        written = strip(content)
        if text.startswith(written, at) and text.startswith(following, at + len(written)):
            return written
    return None


def _starts(parts: list[Part], asked: Asked) -> dict[int, int]:
    """Where the messages of the assistant begin: number -> part. Cuts the parts there, in prompts
    as in documents, because a tokenizer might join what is on both sides. A message whose prompt is
    not the beginning of the text has no place."""
    text = "".join(text for text, _ in parts)
    starts = {}
    for number, prompt in asked.items():
        if isinstance(prompt, str) and text.startswith(prompt):
            start = _cut(parts, len(prompt), number)
            if start is not None:
                starts[number] = start
    return starts


def _cut(parts: list[Part], length: int, number: int) -> int | None:
    """Cut the literal in which the first `length` characters end, and return the number of the part
    that begins there; None where they end within a message, or after message `number`."""
    at = 0
    for index, (text, message) in enumerate(parts):
        if message == number:
            break
        if at + len(text) >= length:
            if message == -1:
                parts[index : index + 1] = [[text[: length - at], -1], [text[length - at :], -1]]
            elif at + len(text) > length:
                break
            return index + 1
        at += len(text)
    return None


def _ways(messages: Messages) -> list[Messages]:
    """How a conversation may be given to a template: as it is, or with thinking apart."""
    split = _split_thinking(messages)
    return [messages] if split == messages else [messages, split]


def _split_thinking(messages: Messages) -> Messages:
    """The messages with an assistant's `<think>...</think>` as reasoning_content, where Qwen's and
    others' templates look for it."""
    split = []
    for message in messages:
        thinking = re.match(r"\s*<think>(.*?)</think>(.*)", message["content"], re.DOTALL)
        if message["role"] == "assistant" and thinking and thinking[1].strip():
            said = {
                "content": thinking[2].lstrip("\n"),
                "reasoning_content": thinking[1].strip("\n"),
            }
            split.append({**message, **said})
        else:
            split.append(message)
    return split
