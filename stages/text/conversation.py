"""Conversations: messages of a system, a user, an assistant and tools, as datasets write them.

Two ways of writing are read: OpenAI's (`role` and `content`) and ShareGPT's (`from` and `value`).
An example of columns is a conversation too, of one user message and its answer. Standard library
only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {
    **dict(zip(ROLES, ROLES, strict=True)),
    **dict.fromkeys(("developer",), "system"),
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "tool_response"), "tool"),
}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
# What a chat template may read besides.
_EXTRA_KEYS = ("tool_calls", "name", "tool_call_id", "reasoning_content")


class Message(NamedTuple):
    """`context` is a text that `content` is about, apart from it; only columns have one. `extra`:
    what else a chat template may read (tool_calls). `learn`: of an assistant's message, whether it
    is an answer to learn (OpenAI's `weight` is not 0)."""

    role: str
    content: str
    context: str = ""
    extra: dict[str, Any] | None = None
    learn: bool = True

    @property
    def is_empty(self) -> bool:
        return not self.content.strip() and not (self.extra or {}).get("tool_calls")


Conversation = tuple[Message, ...]


def is_conversation(value: object) -> bool:
    """Whether a value looks like a conversation: a list of objects with roles."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and set(item) & {*_ROLE_KEYS} for item in value)
    )


def from_json(text: str) -> object:
    """The conversation that a text holds as JSON, as CSV files and PROMPT have it; the text itself
    where it holds none."""
    if text.lstrip()[:1] == "[":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if is_conversation(value):
            return value
    return text


def read_conversation(value: object, not_read: set[str]) -> Conversation | str:
    """The conversation that a dataset's cell holds, or its problem as the end of a sentence.

    A system message without text is left out, and so is what follows the last answer. Adds the
    keys that nothing reads to `not_read`.
    """
    if isinstance(value, str):
        value = from_json(value)
    if not isinstance(value, list):
        return (
            f"is {repr(value)[:40]}, of type {type(value).__name__}: it must be a list of messages "
            "(in CSV as JSON)."
        )
    messages = []
    for number, item in enumerate(value, start=1):
        message = _message(item, not_read)
        if isinstance(message, str):
            return f"message {number} {message}"
        if message.role != "system" or not message.is_empty:
            messages.append(message)
    return tuple(messages)


def until_last_answer(messages: Conversation) -> Conversation:
    """The messages without those after the last answer, which nothing answers."""
    last = max((n for n, one in enumerate(messages) if one.role == "assistant"), default=-1)
    return messages[: last + 1]


def answers_of(messages: Sequence[Message]) -> list[int]:
    """Numbers of the messages that are answers to learn."""
    return [n for n, one in enumerate(messages) if one.role == "assistant" and one.learn]


def is_empty(messages: Conversation) -> bool:
    """Whether nothing can be learned from a conversation: a message without text, or no answer."""
    return any(message.is_empty for message in messages) or not answers_of(messages)


def text_fault(text: str) -> str:
    """Why a text is none, as the end of a sentence; "" where it is one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = (
            f"character {error.start + 1} is U+{ord(text[error.start]):04X}, half of a "
            "surrogate pair"
        )
        return f"is not text: {half}. Write the character itself."
    return ""


def _message(item: object, not_read: set[str]) -> Message | str:
    if not isinstance(item, dict):
        return f"is a {type(item).__name__}: it must be an object with role and content."
    item = {key: part for key, part in item.items() if part is not None}
    role = next((item.pop(key) for key in _ROLE_KEYS if key in item), None)
    known = _ALIASES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        shown = "no role" if role is None else f"the role {str(role)[:40]!r}"
        return f"has {shown}. Roles are {', '.join(ROLES)}, and what ShareGPT calls them."
    content = _text(next((item.pop(key) for key in _CONTENT_KEYS if key in item), ""))
    if content is None:
        return "has content that is not text. Images and sounds are not supported."
    if fault := text_fault(content):
        return f"{fault}"
    learn = item.pop("weight", 1) not in (0, False)
    extra = {key: item.pop(key) for key in _EXTRA_KEYS if item.get(key)}
    try:
        json.dumps(extra, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return f"has {', '.join(extra)} that JSON cannot hold."
    not_read |= {str(key) for key in item}
    return Message(known, content, "", extra or None, learn)


def _text(content: object) -> str | None:
    """The text of a content: a text, or a list of parts that are text; None for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in content
    ]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
