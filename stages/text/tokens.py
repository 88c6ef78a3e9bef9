"""Text to token ids and back, the same way in training and in answering.

`TextTokenizer.load(folder)` needs the `tokenizers` only package and takes milliseconds: the data
stage saves the tokenizer's files next to its rows, and every later stage reads them from there.
`find_tokenizer` is for the data stage: it also takes a Hub id. Text is never control: "</s>" inside
a row is encoded as four characters, and BOS and EOS come from here only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from stages.model.location import local_model
from stages.run.errors import InputError
from stages.run.layout import TOKENIZER_FILES

# Texts to put before a continuation, so that it is not taken for the start of a text: the first
# that no token reaches over.
_ANCHORS = ("\n", "a", ".", "0", " a", "\u4e2d")
_MOST_IDS = 2**24  # of a vocabulary; the largest of today hold 2**18


class TextTokenizer:
    """A model's tokenizer. A document's ids are `bos` + prompt + response + `eos`.

    `bos`: the ids that the tokenizer puts first by itself, usually one or none. `eos`, `pad`: one
    id each (`pad` is `eos` where the tokenizer has none). `controls`: ids that no text may give.
    """

    def __init__(self, tokenizer: Tokenizer, settings: dict[str, Any], files: dict[str, bytes]):
        self._tokenizer, self._files = tokenizer, files
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # meaning: as if they were not special
        eos = self._named(settings, "eos_token")
        if eos is None:
            raise InputError(
                "The tokenizer has no end-of-sequence token, so an answer would have no end. "
                'Name one of its tokens as "eos_token" in tokenizer_config.json, or choose '
                "another MODEL_ID."
            )
        self.eos: int = eos
        pad = self._named(settings, "pad_token")
        self.pad: int = eos if pad is None else pad
        self.bos: tuple[int, ...] = self._leading(settings)
        special = {
            id: token.content
            for id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        unknown = self._named(settings, "unk_token")
        self.controls = frozenset((special.keys() | {self.eos, *self.bos}) - {unknown})
        spellings = {id: tokenizer.id_to_token(id) for id in self.controls}
        if not all(spellings.values()):
            raise InputError(
                "The tokenizer puts tokens around a text that its vocabulary lacks. Correct its "
                "tokenizer.json."
            )
        self._mark_spaces = _marks_spaces(tokenizer)
        if self._mark_spaces:
            tokenizer.normalizer = None  # `_encode` does its work
        self._spelling = re.compile(
            "|".join(map(re.escape, sorted(spellings.values(), key=len, reverse=True)))
        )

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """The tokenizer in a folder with tokenizer.json; raises InputError when there is none or it
        has no EOS."""
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
        with _refused(f"{folder}/tokenizer.json cannot be read"):
            tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        settings: dict[str, Any] = {}
        for name in (
            "special_tokens_map.json",
            "tokenizer_config.json",
        ):  # the later one wins, as in transformers
            try:
                read = json.loads(files.get(name, b"{}"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{folder}/{name} is not JSON: {error}") from None
            if not isinstance(read, dict):
                raise InputError(
                    f"{folder}/{name} is not a JSON object but a {type(read).__name__}."
                )
            settings |= {key: value for key, value in read.items() if value is not None}
        try:
            return cls(tokenizer, settings, files)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, byte for byte as they were loaded, so that `load` and
        AutoTokenizer read them there."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)

    @property
    def vocab_size(self) -> int:
        """The least vocabulary that a model needs for every id of the tokenizer."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_prompt(self, prompt: str) -> list[int]:
        """BOS and the ids of a prompt: what a document begins with in training and what a model is
        given to answer."""
        [ids] = self.encode_prompts([prompt])
        if ids is None:
            raise InputError(
                "The prompt holds a control token's spelling that this tokenizer cannot encode as "
                "text. Take it out."
            )
        return ids

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int] | None]:
        """`encode_prompt` of each; None for one that holds a control token's spelling that cannot
        be encoded as text."""
        bos, encoded = list(self.bos), self._encode(prompts)
        plain = [
            ids if self.controls.isdisjoint(ids) else self._spelt(text)
            for text, ids in zip(prompts, encoded, strict=True)
        ]
        return [None if ids is None else bos + ids for ids in plain]

    def encode_responses(
        self, border: str, responses: Sequence[str]
    ) -> tuple[list[list[int] | None], int]:
        """The ids of each response as it continues after a prompt that ends in `border`; None where
        there is no way.

        Encoded behind `border` and cut off it, so that no response gets the space that many
        tokenizers put before a text. Where a token reaches over the border (a response that begins
        with white space), the prompt alone would not be a prefix of the ids: such a response is
        encoded behind another anchor. Also returns how many were.
        """
        head = self._encode([border])[0]
        found: list[list[int] | None] = []
        split_again = 0
        for response, ids in zip(
            responses, self._encode([border + response for response in responses]), strict=True
        ):
            if ids[: len(head)] != head:
                split_again += 1
                found.append(self._spelt(response, goes_on=True))
            elif self.controls.isdisjoint(ids):
                found.append(ids[len(head) :])
            else:
                found.append(self._spelt(response, goes_on=True))
        return found, split_again

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens left out."""
        with _refused("An answer cannot be decoded with this tokenizer.json"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self._mark_spaces:
            texts = [text and "\u2581" + text.replace(" ", "\u2581") for text in texts]
        with _refused("A text cannot be encoded with this tokenizer.json"):
            return [
                encoding.ids
                for encoding in self._tokenizer.encode_batch_fast(
                    list(texts), add_special_tokens=False
                )
            ]

    def _spelt(self, text: str, goes_on: bool = False) -> list[int] | None:
        """The ids of a text with control tokens' spellings cut in two, which keeps Unigram and
        WordLevel models, whose vocabulary holds them, from finding them. `goes_on`: the text is not
        the start of one. None when a control token remains."""
        cuts = [0, *(match.start() + 1 for match in self._spelling.finditer(text)), len(text)]
        pieces = [text[begin:end] for begin, end in pairwise(cuts)]
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            part = self._continuation(piece) if number or goes_on else self._encode([piece])[0]
            if part is None or not self.controls.isdisjoint(part):
                return None
            ids += part
        return ids

    def _continuation(self, text: str) -> list[int] | None:
        """The ids of a text that is not the start of one; None when tokens reach over every
        anchor."""
        for anchor in _ANCHORS:
            head, ids = self._encode([anchor, anchor + text])
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return None

    def _named(self, settings: dict[str, Any], role: str) -> int | None:
        """The id of the token that the settings give a role, None if there is none; raises
        InputError for one without an id."""
        token = settings.get(role)
        content = token.get("content") if isinstance(token, dict) else token
        if not content:
            return None
        try:
            id = self._tokenizer.token_to_id(content)
        except (TypeError, UnicodeEncodeError):  # it is no text
            id = None
        if id is None:
            raise InputError(
                f"The tokenizer's {role} {str(content)[:60]!r} is not in its vocabulary. Correct "
                "tokenizer_config.json."
            )
        return id

    def _leading(self, settings: dict[str, Any]) -> tuple[int, ...]:
        """The ids put before a text: BOS as add_bos_token says, else what the tokenizer's own
        post-processor puts there."""
        wanted = settings.get("add_bos_token")
        if wanted is not None:
            bos = self._named(settings, "bos_token")
            return (bos,) if wanted and bos is not None else ()
        with _refused("What tokenizer.json puts before a text cannot be found out"):
            whole, inner = (
                self._tokenizer.encode("a", add_special_tokens=special).ids
                for special in (True, False)
            )
        places = [
            at for at in range(len(whole) - len(inner) + 1) if whole[at : at + len(inner)] == inner
        ]
        return tuple(whole[: places[0]]) if places else ()


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """An InputError for what the Rust side raises of a wrong tokenizer.json: plain Exceptions, and
    panics, which are not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{what}: {error}") from None


def _marks_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's normaliser does nothing but SentencePiece's marking of spaces, as
    Llama 2's does.

    `str.replace` does the same and saves an eighth of the cost of tokenising: a normaliser also
    tracks every byte's origin.
    """
    if tokenizer.normalizer is None:
        return False
    marking = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    alone = all(
        token.special for token in tokenizer.get_added_tokens_decoder().values()
    )  # others cut a text: each part gets a mark
    return alone and json.loads(tokenizer.normalizer.__getstate__()) == {
        "type": "Sequence",
        "normalizers": marking,
    }


def find_tokenizer(model: str, revision: str = "") -> TextTokenizer:
    """The tokenizer of a model's folder or Hub id. Only one without tokenizer.json is converted by
    transformers (seconds)."""
    folder = local_model(model)
    if folder is None:
        from stages.model.hub import download_files

        folder = download_files(model, revision, TOKENIZER_FILES)
    if (folder / "tokenizer.json").is_file():
        tokenizer = TextTokenizer.load(folder)
        if tokenizer.vocab_size > _MOST_IDS:
            raise InputError(
                f"MODEL_ID={model}: its tokenizer.json has ids up to "
                f"{tokenizer.vocab_size - 1:,}. Name another model."
            )
        return tokenizer
    from transformers import AutoTokenizer

    with TemporaryDirectory() as converted:
        try:
            AutoTokenizer.from_pretrained(
                folder, use_fast=True, trust_remote_code=False
            ).save_pretrained(converted)
            return TextTokenizer.load(Path(converted))
        except (OSError, ValueError, ImportError, InputError) as error:
            reason = str(error).partition("\n")[0]  # the rest advises to run what exists
            remedy = "Name a model whose folder has tokenizer.json."
            raise InputError(
                f"MODEL_ID={model}: no tokenizer could be made of what is there ({reason}). "
                f"{remedy}"
            ) from None
