"""The format of a model's own chat template, or of the file CHAT_TEMPLATE.

transformers renders it in a process of its own (render): a template is a program that comes with a
model. Only the template's own text becomes control tokens; what a message spells stays text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from stages.run.errors import InputError
from stages.run.json_file import write_json
from stages.run.layout import PROMPT_FILE
from stages.text.conversation import Conversation, Message, answers_of
from stages.text.pieces import Piece, encode_pieces
from stages.text.render_process import OTHER_TEMPLATE, RenderProcess
from stages.text.tokens import TOKENIZER_CONFIG, TextTokenizer, write_config

TEMPLATE_FILE = "chat_template.jinja"
_OTHER_END = "the chat template ends the answer"


def chat_template_of(tokenizer: TextTokenizer) -> str:
    """The chat template among a tokenizer's files, "" where there is none."""
    if TEMPLATE_FILE in tokenizer.files:
        return tokenizer.files[TEMPLATE_FILE].decode(errors="replace")
    template = tokenizer.settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""


def set_chat_template(tokenizer: TextTokenizer, template: str) -> None:
    """Put a chat template where AutoTokenizer reads it, in place of any other."""
    tokenizer.files[TEMPLATE_FILE] = template.encode()
    config = json.loads(tokenizer.files.get(TOKENIZER_CONFIG, b"{}"))
    if config.pop("chat_template", None) is not None:
        write_config(tokenizer.files, config)


class ChatFormat:
    """See PromptFormat. The template is that of the tokenizer's files."""

    starts_text = False

    def __init__(self, tokenizer: TextTokenizer, end: int | None = None, lead: str = ""):
        """`end` and `lead` are those of prompt.json; without them, an example shows them. Raises
        InputError for a template that ends no answer."""
        self._tokenizer, self._template = tokenizer, chat_template_of(tokenizer)
        self._process = RenderProcess(self._template, _special_tokens(tokenizer))
        self._split = lru_cache(4096)(lambda text: list(tokenizer.split(text)))
        self.end, self.lead = tokenizer.eos if end is None else end, lead
        self._begins_with_bos = True
        if end is None:
            self.end, self.lead = self._example()

    def start(self) -> None:
        self._process.start()

    def documents(self, conversations: Sequence[Conversation]) -> list[list[list[Piece]] | str]:
        made = self._made(conversations)
        # The template may end the last answer in another way than those before it (gpt-oss).
        again = [
            number
            for number, one in enumerate(made)
            if isinstance(one, str) and one.startswith(_OTHER_END)
        ]
        alone = self._made([conversations[number] for number in again], alone=True)
        for number, documents in zip(again, alone, strict=True):
            made[number] = documents
        return made

    def _made(
        self, conversations: Sequence[Conversation], alone: bool = False
    ) -> list[list[list[Piece]] | str]:
        return [
            documents if isinstance(documents, str) else self._checked(messages, documents)
            for messages, documents in zip(
                conversations, self._rendered(conversations, alone=alone), strict=True
            )
        ]

    def prompts(self, conversations: Sequence[Conversation]) -> list[list[Piece] | str]:
        return [
            rendered if isinstance(rendered, str) else list(self._pieces(messages, rendered[0]))
            for messages, rendered in zip(
                conversations, self._rendered(conversations, ask=True), strict=True
            )
        ]

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        return [_as_object(message) for message in conversation]

    def chat_template(self) -> str:
        """The template; where it writes the date of the day, with the date that was written."""
        dates = self._process.dates
        if not dates:
            return self._template
        # transformers removes the line end after a block: the template begins a line, as before.
        return (
            f"{{%- macro strftime_now(format) -%}}{{{{- {json.dumps(dates)}.get(format, '') -}}}}"
            f"{{%- endmacro %}}\n{self._template}"
        )

    def description(self) -> str:
        return "chat"

    def notes(self) -> list[str]:
        """What of the template a user should know, once documents are rendered."""
        notes = []
        if dates := self._process.dates:
            notes.append(
                f"the chat template writes the date; it is published with "
                f"{', '.join(map(repr, dates.values()))}, as the model is trained."
            )
        if self._tokenizer.bos and not self._begins_with_bos:
            notes.append(
                "the chat template writes no BOS, which the tokenizer puts before other texts: the "
                "model is trained and asked without."
            )
        return notes

    def save(self, folder: Path) -> None:
        write_json(folder / PROMPT_FILE, {"format": "chat", "end": self.end, "lead": self.lead})

    def _example(self) -> tuple[int, str]:
        """What ends an answer of a short conversation, and what begins it."""
        messages = (Message("user", "a"), Message("assistant", "b"))
        [documents] = self._rendered([messages])
        if isinstance(documents, str):
            raise InputError(f"{documents}, for a short question and its answer. {OTHER_TEMPLATE}")
        pieces = list(self._pieces(messages, documents[0], end=None))
        answer = [piece for piece in pieces if piece.answer]
        self._begins_with_bos = [pieces[0].control] == [*self._tokenizer.bos][:1]
        first, second, *_ = pieces
        if first.control is not None and first.control == second.control:
            raise InputError(f"the chat template begins with {first.text} twice. {OTHER_TEMPLATE}")
        if not answer or answer[-1].control is None:
            rest = pieces[-1].text if pieces else ""
            raise InputError(
                "the chat template ends an answer with no control token of the tokenizer, so that "
                f"a model would not stop; after it stands {rest[:60]!r}. {OTHER_TEMPLATE}"
            )
        return answer[-1].control, self._lead(pieces)

    def _lead(self, pieces: list[Piece]) -> str:
        """What the answer "b" is decoded to, without the b: words of the template, or the space
        that the tokenizer puts after a control token."""
        said = [piece.role == "assistant" for piece in pieces].index(True)
        [runs] = encode_pieces([pieces[: said + 1]], self._tokenizer, self.starts_text)
        ids = [id for run in runs or () if run.answer for id in run.ids]
        return self._tokenizer.decode_answer(ids).removesuffix(pieces[said].text)

    def _rendered(
        self, conversations: Sequence[Conversation], ask: bool = False, alone: bool = False
    ) -> list[list[dict[str, Any]] | str]:
        """What the renderer makes of each conversation; or why it makes nothing."""
        request, problems = [], {}
        for number, messages in enumerate(conversations):
            # An answer without a question before it is part of the prompts after it.
            answers = [at for at in answers_of(messages) if at]
            if problem := self._problem(messages, answers, ask):
                problems[number] = problem
            else:
                request.append(([_as_object(message) for message in messages], answers))
        rendered = iter(self._process.ask(request, ask, alone) if request else ())
        return [
            problems[number] if number in problems else next(rendered)
            for number in range(len(conversations))
        ]

    def _problem(self, messages: Conversation, answers: list[int], ask: bool) -> str:
        if not answers and not ask:
            return "no answer follows a question."
        for number, message in enumerate(messages, start=1):
            if message.extra and self._tokenizer.spells_control(
                json.dumps(message.extra, ensure_ascii=False)
            ):
                return (
                    f"message {number} spells a control token in {', '.join(message.extra)}, which "
                    "the template writes as its own words. Remove it."
                )
        return ""

    def _checked(
        self, messages: Conversation, documents: list[dict[str, Any]]
    ) -> list[list[Piece]] | str:
        """The pieces of each document; a text where an answer ends in another way than others."""
        written = [list(self._pieces(messages, document, self.end)) for document in documents]
        for document, pieces in zip(documents, written, strict=True):
            ended: list[bool] = []
            for piece in pieces:
                if piece.answer and piece.apart:
                    ended.append(False)
                if piece.answer and piece.control == self.end:
                    ended[-1] = True
            if not all(ended):
                number = document["numbers"][ended.index(False)] + 1
                end = self._tokenizer.spelling(self.end)
                return f"{_OTHER_END} of message {number} with something else than {end!r}."
        return written

    def _pieces(
        self, messages: Conversation, document: dict[str, Any], end: int | None = -1
    ) -> Iterator[Piece]:
        """The pieces of a rendered document. An answer ends with the control token `end`, or (None)
        with the first one after its text."""
        answering = said = apart = False
        for index, (text, number) in enumerate(document["parts"]):
            apart = apart or index in document["starts"]
            if index in document["answers"]:
                answering, said = True, False
            if number >= 0:
                role = messages[number].role
                said = said or role == "assistant"
                yield Piece(text, role, answer=answering, apart=apart)
                apart = apart and not text
                continue
            for part, id in self._split(text):
                yield Piece(part, "template", id, literal=True, answer=answering, apart=apart)
                apart = False
                if id is not None and (said if end is None else id == end):
                    answering = False


def _as_object(message: Message) -> dict[str, Any]:
    """A message as a chat template reads it. A context, which only columns have, follows the
    text."""
    content = message.content
    if message.context.strip():
        content += f"\n\n{message.context}"
    return {"role": message.role, "content": content, **(message.extra or {})}


def _special_tokens(tokenizer: TextTokenizer) -> dict[str, str]:
    """The tokens that a template may name: bos_token, eos_token and others."""
    tokens = {}
    for name, token in tokenizer.settings.items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens
