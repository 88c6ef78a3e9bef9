"""Text to token ids and back, the same way in training and in answering.

`TextTokenizer.load(folder)` needs only the `tokenizers` package and takes milliseconds: the data
stage saves the tokenizer's files next to its sequences, and every later stage reads them from
there. Text never becomes a control token: "</s>" in an example is encoded as four characters, and
only this module adds BOS and EOS. One token may have several roles: EOS is BOS, UNK or PAD too in
many models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from stages.run.errors import InputError
from stages.run.layout import TOKENIZER_FILES

# Texts to put before a continuation, so that it is not encoded as the start of a text. The first
# one that shares no token with the continuation is used.
_ANCHORS = ("\n", "a", ".", "0", " a", "\u4e2d")


TOKENIZER_CONFIG = "tokenizer_config.json"


def write_config(files: dict[str, bytes], config: dict[str, Any]) -> None:
    """Replace the tokenizer_config.json among a tokenizer's files. Escaped, because it may hold
    half a surrogate pair."""
    files[TOKENIZER_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()


class Encoding(NamedTuple):
    """The ids of a text, None where it cannot be encoded without control tokens; `split_again`:
    whether a token would have spanned its border."""

    ids: list[int] | None
    split_again: bool


class TextTokenizer:
    """A model's tokenizer. A document's ids are `bos` + prompt + response + `eos`.

    `settings`: of tokenizer_config.json. `after_control`: the border of a text that follows a
    control token. `bos`: the ids that the tokenizer puts first, usually one or none. `eos`, `pad`:
    one id each (`pad` is `eos` where the tokenizer has none). `controls`: ids that no text may
    produce, which UNK is only where it is BOS or EOS. `strips_left`, `strips_right`: those of them
    that take the white space beside them.
    """

    def __init__(self, tokenizer: Tokenizer, settings: dict[str, Any], files: dict[str, bytes]):
        self._tokenizer, self.files = tokenizer, files
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # means: encode their spellings as plain text
        eos = self._token_id(settings, "eos_token")
        if eos is None:
            raise InputError(
                "The tokenizer has no end-of-sequence token, so an answer would have no end. "
                'Name one of its tokens as "eos_token" in tokenizer_config.json, or choose '
                "another MODEL_ID."
            )
        self.eos: int = eos
        pad = self._token_id(settings, "pad_token")
        self.pad: int = eos if pad is None else pad
        self.bos: tuple[int, ...] = self._leading(settings)
        special = {
            id: token.content
            for id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        unknown = self._token_id(settings, "unk_token")
        self.controls = frozenset((special.keys() - {unknown}) | {self.eos, *self.bos})
        spellings = {id: tokenizer.id_to_token(id) for id in self.controls}
        if not all(spellings.values()):
            raise InputError(
                "The tokenizer puts tokens around a text that are not in its vocabulary. Correct "
                "its tokenizer.json."
            )
        continues = self._continues_after(spellings[self.eos])
        self._mark_spaces = _marks_spaces(tokenizer)
        if self._mark_spaces:
            tokenizer.normalizer = None  # `_encode` does its work
        self._spelling = re.compile(
            "|".join(map(re.escape, sorted(spellings.values(), key=len, reverse=True)))
        )
        self._ids = {spelling: id for id, spelling in spellings.items()}
        added = tokenizer.get_added_tokens_decoder()
        self.strips_left = {id for id in self.controls if id in added and added[id].lstrip}
        self.strips_right = {id for id in self.controls if id in added and added[id].rstrip}
        self.settings = settings
        self.after_control = "\n" if continues else ""
        self._before_answer = self._reversible_anchor()

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """The tokenizer in a folder with tokenizer.json; raises InputError when there is none or it
        has no EOS token."""
        files = {
            name: (folder / name).read_bytes()
            for name in TOKENIZER_FILES
            if (folder / name).is_file()
        }
        if "tokenizer.json" not in files:
            raise InputError(
                f"{folder} has no tokenizer.json. Name a model's folder, or run the data stage "
                "again."
            )
        with _rust_errors(f"{folder}/tokenizer.json cannot be read"):
            tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        settings: dict[str, Any] = {}
        # The later file wins, as in transformers.
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            try:
                content = json.loads(files.get(name, b"{}"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{folder}/{name} is not JSON: {error}.") from None
            if not isinstance(content, dict):
                raise InputError(
                    f"{folder}/{name} is not a JSON object but a {type(content).__name__}."
                )
            settings |= {key: value for key, value in content.items() if value is not None}
        try:
            return cls(tokenizer, settings, files)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None

    def save(self, folder: Path) -> None:
        """Write `files`, which are those that were loaded, so that `load` and AutoTokenizer read
        them there."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    @property
    def vocab_size(self) -> int:
        """The least vocabulary that a model needs for every id of the tokenizer."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def spelling(self, id: int) -> str | None:
        """The token of an id; None where the vocabulary has no such id."""
        try:
            return self._tokenizer.id_to_token(id)
        except (TypeError, OverflowError):  # an id from a config, which may be anything
            return None

    def encode_after(self, borders: Sequence[str], texts: Sequence[str]) -> list[Encoding]:
        """The ids of each text as it continues its border; an empty border is the start of a text.

        A text is encoded after its border, whose ids are then removed, so that it does not get the
        space that many tokenizers put before a text. Where a token would span both, the border's
        ids would not be a prefix of the document's: the text is then split again, which means
        encoded after another anchor.
        """
        heads = dict.fromkeys(borders)
        heads.update(zip(heads, self._encode(list(heads)), strict=True))
        encoded = []
        for border, text, ids in zip(
            borders,
            texts,
            self._encode([border + text for border, text in zip(borders, texts, strict=True)]),
            strict=True,
        ):
            head = heads[border] or []
            apart = ids[: len(head)] == head
            if apart and self.controls.isdisjoint(ids):
                encoded.append(Encoding(ids[len(head) :], False))
            else:
                as_text = self._encode_as_text(text, continues=bool(border))
                encoded.append(Encoding(as_text, not apart))
        return encoded

    def spells_control(self, text: str) -> bool:
        """Whether a text has the spelling of a control token in it."""
        return self._spelling.search(text) is not None

    def split(self, literal: str) -> Iterator[tuple[str, int | None]]:
        """The parts of a template's own text: text, and control tokens with their ids."""
        at = 0
        for match in self._spelling.finditer(literal):
            if at < match.start():
                yield literal[at : match.start()], None
            yield match[0], self._ids[match[0]]
            at = match.end()
        if at < len(literal):
            yield literal[at:], None

    def decode_answer(self, ids: Sequence[int]) -> str:
        """The text of ids that continue a prompt: what `encode_after` made them from.

        The start of a text is decoded without its first space, so the ids are decoded after an
        anchor, as they were encoded after the prompt's border, and the anchor is cut off.
        """
        anchor, before = self._before_answer
        return self.decode([*before, *ids])[len(anchor) :]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without control tokens."""
        with _rust_errors("An answer cannot be decoded with this tokenizer.json"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self._mark_spaces:
            texts = [text and "\u2581" + text.replace(" ", "\u2581") for text in texts]
        with _rust_errors("A text cannot be encoded with this tokenizer.json"):
            return [
                encoding.ids
                for encoding in self._tokenizer.encode_batch_fast(
                    list(texts), add_special_tokens=False
                )
            ]

    def _encode_as_text(self, text: str, continues: bool = False) -> list[int] | None:
        """The ids of a text whose spellings of control tokens are cut in two, so that Unigram and
        WordLevel models, whose vocabulary has them, do not match them. `continues`: the text is
        not the start of one. None when a control token remains."""
        cuts = [0, *(match.start() + 1 for match in self._spelling.finditer(text)), len(text)]
        pieces = [text[begin:end] for begin, end in pairwise(cuts)]
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            part = self._continuation(piece) if number or continues else self._encode([piece])[0]
            if part is None or not self.controls.isdisjoint(part):
                return None
            ids += part
        return ids

    def _continuation(self, text: str) -> list[int] | None:
        """The ids of a text that is not the start of one; None when a token spans the end of every
        anchor."""
        for anchor in _ANCHORS:
            head, ids = self._encode([anchor, anchor + text])
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return None

    def _continues_after(self, control: str) -> bool:
        """Whether text after a control token gets no space before it, which the start of a text
        gets (Metaspace with prepend_scheme "first")."""
        with _rust_errors("A text cannot be encoded with this tokenizer.json"):
            self._tokenizer.encode_special_tokens = False
            after = self._tokenizer.encode(f"{control}a", add_special_tokens=False).ids
            self._tokenizer.encode_special_tokens = True
            start = self._tokenizer.encode("a", add_special_tokens=False).ids
        return after[:1] == [self.eos] and after[1:] != start

    def _reversible_anchor(self) -> tuple[str, list[int]]:
        """A text and its ids, after which ids are decoded to the text that they were encoded from;
        nothing where the tokenizer does not decode so (words joined by spaces)."""
        for anchor in _ANCHORS[1:]:  # a line end may be a byte, which joins a broken character
            before, after = self._encode([anchor])[0], self._continuation(anchor)
            if after and self.decode([*before, *after]) == 2 * anchor == 2 * self.decode(before):
                return anchor, before
        return "", []

    def _token_id(self, settings: dict[str, Any], role: str) -> int | None:
        """The id of the token that has a role in the settings, None if there is none; raises
        InputError for a token without an id."""
        token = settings.get(role)
        content = token.get("content") if isinstance(token, dict) else token
        if not content:
            return None
        try:
            id = self._tokenizer.token_to_id(content)
        except (TypeError, UnicodeEncodeError):  # not text
            id = None
        if id is None:
            raise InputError(
                f"The tokenizer's {role} {str(content)[:60]!r} is not in its vocabulary. Correct "
                "tokenizer_config.json."
            )
        return id

    def _leading(self, settings: dict[str, Any]) -> tuple[int, ...]:
        """The ids before a text: BOS where add_bos_token is set, else what the tokenizer's
        post-processor adds."""
        add_bos = settings.get("add_bos_token")
        if add_bos is not None:
            bos = self._token_id(settings, "bos_token")
            return (bos,) if add_bos and bos is not None else ()
        with _rust_errors("What tokenizer.json puts before a text cannot be determined"):
            complete, inner = (
                self._tokenizer.encode("a", add_special_tokens=special).ids
                for special in (True, False)
            )
        starts = range(len(complete) - len(inner) + 1)
        matches = [at for at in starts if complete[at : at + len(inner)] == inner]
        return tuple(complete[: matches[0]]) if matches else ()


@contextmanager
def _rust_errors(message: str) -> Iterator[None]:
    """Turn what the Rust library raises for a wrong tokenizer.json into an InputError: plain
    Exceptions, and panics, which derive from BaseException."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{message}: {error}") from None


def _marks_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's normaliser only marks spaces as SentencePiece does, like Llama 2's.

    `str.replace` does the same and saves an eighth of the cost of tokenising, because a normaliser
    also tracks the origin of every byte.
    """
    if tokenizer.normalizer is None:
        return False
    marking = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    # An added token that is not special cuts a text, and each part gets a mark.
    only_special = all(token.special for token in tokenizer.get_added_tokens_decoder().values())
    normalizer = {"type": "Sequence", "normalizers": marking}
    return only_special and json.loads(tokenizer.normalizer.__getstate__()) == normalizer
