"""A document in pieces: its texts and control tokens in order, each with the role that it belongs
to. A prompt format makes them; here they become token ids, for training and for answering alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stages.text.tokens import TextTokenizer

# Whose tokens: a message's role, or the template for control tokens and texts between messages.
ROLES = ("template", "system", "user", "assistant", "tool")


class Piece(NamedTuple):
    """`control`: the id of a control token, whose spelling is `text`; None for text, which never
    becomes one. `literal`: whether the text is the template's own, and not a message's. `answer`:
    whether the model is to say it. `apart`: whether it begins a message of the assistant, which is
    encoded apart from what is before it, in documents and prompts alike."""

    text: str
    role: str
    control: int | None = None
    literal: bool = False
    answer: bool = False
    apart: bool = False


class Run(NamedTuple):
    """The ids of neighbouring pieces that are encoded as one."""

    ids: list[int]
    role: str
    answer: bool
    split_again: bool = False


class _Chunk(NamedTuple):
    border: str
    text: str
    role: str
    answer: bool


def encode_pieces(
    documents: Sequence[list[Piece]], tokenizer: TextTokenizer, starts_text: bool
) -> list[list[Run] | None]:
    """The runs of each document, in order; None for one whose text cannot be kept apart from
    control tokens or from the prompt before it.

    Neighbouring texts are encoded as one, as a tokenizer encodes a rendered template, except that
    a message of the assistant begins a run of its own, also one that is not learned: the prompt's
    ids are then a prefix of the document's, and a conversation keeps its ids when it goes on.
    `starts_text`: what follows the BOS is encoded as the start of a text, as a tokenizer does that
    puts the BOS itself.
    """
    planned = [list(_chunks(pieces, tokenizer, starts_text)) for pieces in documents]
    chunks = [part for parts in planned for part in parts if isinstance(part, _Chunk)]
    encodings = iter(
        tokenizer.encode_after([one.border for one in chunks], [one.text for one in chunks])
    )
    encoded: list[list[Run] | None] = []
    for parts in planned:
        runs, failed = [], False
        for part in parts:
            if isinstance(part, Run):
                runs.append(part)
                continue
            ids, split_again = next(encodings)
            failed = failed or ids is None
            runs.append(Run(ids or [], part.role, part.answer, split_again and part.answer))
        encoded.append(None if failed else runs)
    return encoded


def _chunks(
    pieces: Iterable[Piece], tokenizer: TextTokenizer, starts_text: bool
) -> Iterable[Run | _Chunk]:
    """The control tokens of a document as runs, and between them its texts as chunks to encode.
    White space beside a control token that takes it (Phi-3's) is gone."""
    texts: list[Piece] = []
    border, controls, strips = "", 0, False

    def flush() -> Iterable[_Chunk]:
        if texts:
            roles = [piece.role for piece in texts if not piece.literal]
            role = roles[-1] if roles else "assistant" if texts[0].answer else "template"
            yield _Chunk(border, "".join(one.text for one in texts), role, texts[0].answer)

    for piece in pieces:
        if piece.control is not None:
            while piece.control in tokenizer.strips_left and texts:
                *texts, last = texts
                if text := last.text.rstrip():
                    texts.append(last._replace(text=text))
                    break
            yield from flush()
            strips = piece.control in tokenizer.strips_right
            role = "assistant" if piece.answer else "template"
            yield Run([piece.control], role, piece.answer)
            texts, controls = [], controls + 1
            leading = starts_text and controls <= len(tokenizer.bos)
            border = "" if leading else tokenizer.after_control
            continue
        if texts and (piece.apart or piece.answer != texts[0].answer):
            yield from flush()
            # The template's last words suffice to encode what follows them.
            last = texts[-1]
            border = last.text if last.literal else "".join(one.text for one in texts)
            texts = []
        text = piece.text.lstrip() if strips and not texts else piece.text
        if text:
            texts.append(piece._replace(text=text) if strips else piece)
            strips = False
    yield from flush()
