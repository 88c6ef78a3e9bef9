"""Tiny tokenizers of the kinds that models have, trained here in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from stages.text.tokens import TextTokenizer

CORPUS = [
    "### Instruction What is a Trainium core? ### Context A chip has two cores. ### Answer It is "
    "an accelerator.",
    "the cat sat on the mat and the dog sat on the log, and then they all went home",
    "When the model answers, it answers in the words that it was trained with.",
] * 3
KINDS = ("byte_level", "llama", "metaspace", "unigram")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, **settings: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


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


def llama(folder: Path) -> Path:
    """As Llama 2: SentencePiece's BPE, a space before every text, bytes for what the vocabulary
    lacks, BOS put first."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    )
    parts = json.loads(trained.to_str())
    vocabulary = parts["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    parts["model"].update(byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer.from_str(json.dumps({**parts, "pre_tokenizer": None}))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return write_tokenizer(
        folder,
        tokenizer,
        bos_token="<s>",
        eos_token={"content": "</s>"},
        unk_token="<unk>",
        add_bos_token=True,
    )


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


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    makers = (byte_level, llama, metaspace, unigram)
    return {
        make.__name__: make(tmp_path_factory.mktemp("tokenizers") / make.__name__)
        for make in makers
    }


@pytest.fixture(scope="session")
def tokenizers(folders: dict[str, Path]) -> dict[str, TextTokenizer]:
    return {kind: TextTokenizer.load(folder) for kind, folder in folders.items()}
