"""Examples and questions of columns as conversations, and the plainest way to their ids."""

from __future__ import annotations

from pathlib import Path

from stages.text.answer import encode_questions
from stages.text.conversation import Message
from stages.text.examples import Example, open_examples
from stages.text.prompt import TextFormat
from stages.text.questions import Question
from stages.text.tokens import TextTokenizer

ANSWER_HEADER = "### Answer\n"


def example(place: str, instruction: str, context: str, response: str) -> Example:
    return Example(place, (Message("user", instruction, context), Message("assistant", response)))


def question(instruction: str, context: str = "", expected: str | None = None) -> Question:
    return Question((Message("user", instruction, context),), expected)


def texts_of(row: Example) -> tuple[str, str, str]:
    """Instruction, context and response of an example of columns."""
    *asked, answer = row.messages
    [user] = asked or [Message("user", "")]
    assert (user.role, answer.role) == ("user", "assistant")
    return user.content, user.context, answer.content


def read(dataset: Path | str, **options: object) -> list[Example]:
    """Every example of a dataset."""
    return [row for batch in open_examples(str(dataset), **options).batches for row in batch]


def dolly(instruction: str, context: str, response: str) -> str:
    """A document as the tutorial formats it."""
    parts = [
        f"### Instruction\n{instruction}",
        f"### Context\n{context}" if context.strip() else None,
        f"{ANSWER_HEADER}{response}",
    ]
    return "\n\n".join(part for part in parts if part is not None)


def text_ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    """BOS and the ids of a text alone."""
    [(ids, _)] = tokenizer.encode_after([""], [text])
    assert ids is not None
    return [*tokenizer.bos, *ids]


def prompt_ids(tokenizer: TextTokenizer, instruction: str, context: str = "") -> list[int]:
    """What eval gives the model."""
    format = TextFormat(tokenizer)
    [ids] = encode_questions([question(instruction, context)], tokenizer, format, 2**20)
    return ids
