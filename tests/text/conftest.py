"""Tiny tokenizers of the kinds that models have, trained here in milliseconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stages.text.tokens import TextTokenizer
from tests.text.tokenizer_kinds import CORPUS, REAL, llama, write_tokenizer


def byte_level(folder: Path) -> Path:
    """As GPT-2, Llama 3 and Qwen: bytes, split by a regular expression; no BOS, and a padding token
    of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|pad|>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet),
    )
    return write_tokenizer(folder, tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def metaspace(folder: Path) -> Path:
    """As newer conversions of SentencePiece: the space before a text comes from the
    pre-tokenizer."""
    tokenizer = Tokenizer.from_file(str(llama(folder) / "tokenizer.json"))
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return write_tokenizer(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram(folder: Path) -> Path:
    """As T5 and XLNet: its vocabulary holds its control tokens as ordinary pieces, so only text
    can find them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, "a < b > c / d s"], trainer)
    return write_tokenizer(
        folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
    )


MAKERS = {make.__name__: make for make in (byte_level, metaspace, unigram, *REAL)}
KINDS = tuple(MAKERS)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: make(tmp_path_factory.mktemp("tokenizers") / kind) for kind, make in MAKERS.items()
    }


@pytest.fixture(scope="session")
def tokenizers(folders: dict[str, Path]) -> dict[str, TextTokenizer]:
    return {kind: TextTokenizer.load(folder) for kind, folder in folders.items()}
