"""How a conversation is written for the model: by a text template (here) or by the model's chat
template (chat_format). A format makes pieces of conversations, for training and for answering.

The data stage saves the format next to its sequences and the later stages copy it, so a model is
asked in the words that it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from stages.run.errors import InputError
from stages.run.json_file import write_json
from stages.run.layout import PROMPT_FILE
from stages.text.conversation import Conversation, Message
from stages.text.pieces import Piece
from stages.text.text_template import DOLLY, PLAIN, words
from stages.text.tokens import TextTokenizer


class PromptFormat(Protocol):
    """Writes conversations as pieces. In place of one that it cannot write stands the reason, as a
    sentence that begins after the conversation's place.

    `starts_text`: whether the text after BOS is encoded as the start of a text. `lead`: text that
    begins each answer and is not part of it, such as `<think></think>` with nothing in it. `end`:
    the id that ends an answer.
    """

    starts_text: bool
    lead: str
    end: int

    def start(self) -> None:
        """Start what the first prompt would wait for."""

    def documents(self, conversations: Sequence[Conversation]) -> list[list[list[Piece]] | str]:
        """The documents that each conversation is trained as: one, or one for each answer where
        the template writes earlier answers in other words."""

    def prompts(self, conversations: Sequence[Conversation]) -> list[list[Piece] | str]:
        """The prompt for the answer to each conversation, the beginning of a document."""

    def chat_template(self) -> str:
        """A chat template (Jinja) that renders messages as this format does."""

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The conversation as that chat template reads it: what a client sends to a server."""

    def description(self) -> str:
        """The format's name for messages and manifests."""

    def notes(self) -> list[str]:
        """What a user should know of it, once documents are made."""

    def save(self, folder: Path) -> None:
        """Write the format to prompt.json in `folder`."""


class TextFormat:
    """A text template. Each answer is ended by EOS; in a conversation the template begins again
    after it, and a system message is the context of the user's message that follows."""

    lead, starts_text = "", True

    def __init__(self, tokenizer: TextTokenizer, template: str = DOLLY):
        self.template, self.end = template, tokenizer.eos
        self._bos = [_control(tokenizer, id) for id in tokenizer.bos]
        self._eos = _control(tokenizer, tokenizer.eos)
        # Whether the tokenizer puts a space before a text that has none, but not after BOS.
        self._first = bool(self._bos and tokenizer.after_control)
        self._words = {
            has_context: [
                word.text
                if word.is_part
                else [Piece(*part, literal=True) for part in _literal(word.text, tokenizer)]
                for word in words(template, has_context)
            ]
            for has_context in (True, False)
        }
        literals = chain(*(word for word in self._words[True] if not isinstance(word, str)))
        framing = {*tokenizer.bos, tokenizer.eos}
        if any(piece.control in framing for piece in literals if piece.control is not None):
            raise InputError(
                "The prompt's template spells BOS or EOS, which are put around a document anyway. "
                "Remove them from it."
            )

    def start(self) -> None:
        pass

    def documents(self, conversations: Sequence[Conversation]) -> list[list[list[Piece]] | str]:
        written = (self._written(messages) for messages in conversations)
        return [one if isinstance(one, str) else [one] for one in written]

    def prompts(self, conversations: Sequence[Conversation]) -> list[list[Piece] | str]:
        return [self._written(messages, asks=True) for messages in conversations]

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        return [
            {"role": role, "content": content}
            for message in conversation
            for role, content in (("system", message.context), (message.role, message.content))
            if role != "system" or content.strip()
        ]

    def description(self) -> str:
        known = {DOLLY: "dolly", PLAIN: "text without a prompt"}
        return known.get(self.template, "PROMPT_TEMPLATE")

    def notes(self) -> list[str]:
        return []

    def save(self, folder: Path) -> None:
        write_json(folder / PROMPT_FILE, {"format": "text", "template": self.template})

    def chat_template(self) -> str:
        with_context, without = (_jinja(self._words[one]) for one in (True, False))
        if "context" not in self._words[True]:
            with_context = "{{- raise_exception('This model knows no system messages.') -}}"
        text = (
            "{%- set ns = namespace(context='') -%}"
            "{%- for message in messages -%}"
            "{%- if message['role'] == 'system' -%}"
            "{%- if ns.context -%}{%- set ns.context = ns.context + '\\n\\n' -%}{%- endif -%}"
            "{%- set ns.context = ns.context + message['content'] -%}"
            "{%- elif message['role'] == 'user' -%}"
            "{%- if ns.context.strip() -%}" + with_context + "{%- else -%}" + without + "{%- endif "
            "-%}{%- set ns.context = '' -%}"
            "{%- elif message['role'] == 'assistant' -%}"
            f"{{{{- message['content'] + {_quoted(self._eos.text)} -}}}}"
            "{%- else -%}"
            "{{- raise_exception('This model knows system, user and assistant messages only.') -}}"
            "{%- endif -%}{%- endfor -%}"
        )
        bos = _quoted("".join(piece.text for piece in self._bos))
        if not self._first:
            return f"{{{{- {bos} -}}}}{text}"
        space = f"('' if text[:1] in {_quoted(_SPACES)} else ' ')"
        return f"{{%- set text -%}}{text}{{%- endset -%}}{{{{- {bos} + {space} + text -}}}}"

    def _written(self, messages: Conversation, asks: bool = False) -> list[Piece] | str:
        """The pieces of a document, or of a prompt (`asks`)."""
        pieces, contexts, user = list(self._bos), list[str](), None
        for number, message in enumerate(messages, start=1):
            if message.role == "tool" or message.extra:
                return _has_no_place(number, message)
            if message.role == "system":
                contexts.append(message.content)
            elif message.role == "user":
                if user is not None:
                    return f"message {number} is the user's, as the one before. {_IN_TURN}"
                user = message
                parts = [*contexts, message.context]
                context = "\n\n".join(text for text in parts if text and not text.isspace())
                if context and "context" not in self._words[True]:
                    return f"message {number} has a context or system message. {_NOWHERE}"
                pieces += self._asked(message, context)
                contexts = []
            else:
                if (user is None and self.template != PLAIN) or contexts:
                    after = " after the system message before it" if contexts else ""
                    return f"message {number} answers nothing{after}. {_IN_TURN}"
                pieces += [
                    Piece(message.content, "assistant", answer=message.learn, apart=True),
                    self._eos._replace(answer=message.learn),
                ]
                user = None
        if contexts:
            return f"its last system message has no message of the user after it. {_IN_TURN}"
        if asks and user is None:
            return f"its last message is not the user's. {_IN_TURN}"
        return pieces

    def _asked(self, message: Message, context: str) -> Iterator[Piece]:
        for word in self._words[bool(context)]:
            if not isinstance(word, str):
                yield from word
            else:
                yield Piece(context if word == "context" else message.content, "user")


_SPACES = " \u2581"  # to SentencePiece, the same
_IN_TURN = (
    "A text template needs a message of the user before each answer. Set PROMPT_FORMAT=chat, or "
    "change the conversation."
)
_NOWHERE = (
    "The text template has no place for it. Write {context} in PROMPT_TEMPLATE, leave the context "
    "out (CONTEXT_COLUMN= reads none), or name other questions in PROMPTS."
)


def load_format(folder: Path, tokenizer: TextTokenizer) -> PromptFormat:
    """The format in prompt.json of a folder with the tokenizer's files; raises InputError when
    there is none."""
    file = folder / PROMPT_FILE
    try:
        saved: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: the prompt's format cannot be read ({error}). Run the data stage again."
        ) from None
    kind = saved.get("format") if isinstance(saved, dict) else None
    if kind == "text" and isinstance(saved.get("template"), str):
        return TextFormat(tokenizer, saved["template"])
    if kind == "chat":
        from stages.text.chat_format import ChatFormat

        end, lead = saved.get("end"), saved.get("lead")
        if type(end) is int and end in tokenizer.controls and isinstance(lead, str):
            return ChatFormat(tokenizer, end, lead)
    raise InputError(f"{file} holds no prompt format. Run the data stage again.")


def _control(tokenizer: TextTokenizer, id: int) -> Piece:
    return Piece(tokenizer.spelling(id) or "", "template", id, literal=True)


def _literal(text: str, tokenizer: TextTokenizer) -> Iterator[tuple[str, str, int | None]]:
    return ((part, "template", id) for part, id in tokenizer.split(text))


def _has_no_place(number: int, message: Message) -> str:
    what = "is a tool's" if message.role == "tool" else f"has {', '.join(message.extra or ())}"
    return (
        f"message {number} {what}, for which a text template has no place. Set PROMPT_FORMAT=chat "
        "with a chat template that has."
    )


def _jinja(words: list[Any]) -> str:
    parts = {"instruction": "message['content']", "context": "ns.context"}
    return "".join(
        f"{{{{- {parts[word]} -}}}}"
        if isinstance(word, str)
        else f"{{{{- {_quoted(''.join(piece.text for piece in word))} -}}}}"
        for word in words
    )


def _quoted(text: str) -> str:
    """A text as a string of Jinja."""
    return "'" + text.encode("unicode_escape").decode().replace("'", "\\'") + "'"
