"""Tokenizers built as those of well-known models are, with tiny vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "### Instruction What is a Trainium core? ### Context A chip has two cores. ### Answer It is "
    "an accelerator.",
    "the cat sat on the mat and the dog sat on the log, and then they all went home",
    "When the model answers, it answers in the words that it was trained with.",
    "def f(x):\n    y = x + 1\n\n    return y\n",
] * 3
# The texts that Llama 3 and Qwen cut a text into, shortened: words, digits, signs, white space.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_tokenizer(folder: Path, tokenizer: Tokenizer, **settings: object) -> Path:
    """`settings`: of tokenizer_config.json. AutoTokenizer takes a class of its own for each
    `tokenizer_class`; without one it goes by the model's type."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _bytes_bpe(
    pre_tokenizer: pre_tokenizers.PreTokenizer, special: list[str], **model: object
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def _split_by_words() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, by_bytes])


def gpt2(folder: Path) -> Path:
    """GPT-2 and OPT: one token is BOS, EOS and UNK, and no text is put around a text."""
    tokenizer = _bytes_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])
    end = "<|endoftext|>"
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    return write_tokenizer(folder, tokenizer, tokenizer_class="GPT2Tokenizer", **roles)


def smollm2(folder: Path) -> Path:
    """SmolLM2: digits stand alone, and one token is BOS, EOS, UNK and PAD."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = _bytes_bpe(
        pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    end = "<|endoftext|>"
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), end)
    return write_tokenizer(folder, tokenizer, tokenizer_class="GPT2Tokenizer", **roles)


def gpt2_without_special(folder: Path) -> Path:
    """As converted from GPT-2's vocab.json: the token of all roles is an ordinary entry."""
    tokenizer = _bytes_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), [])
    parts = json.loads(tokenizer.to_str())
    parts["model"]["vocab"]["<|endoftext|>"] = len(parts["model"]["vocab"])
    end = "<|endoftext|>"
    return write_tokenizer(
        folder,
        Tokenizer.from_str(json.dumps(parts)),
        tokenizer_class="GPT2Tokenizer",
        **{"bos_token": end, "eos_token": end, "unk_token": end},
    )


def llama3(folder: Path) -> Path:
    """Llama 3: BOS from a template, EOS is the end of a turn, and transformers removes spaces
    before signs from what it decodes."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = _bytes_bpe(_split_by_words(), special, ignore_merges=True)
    bos = special[0]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template]
    )
    return write_tokenizer(
        folder,
        tokenizer,
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=bos,
        eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=True,
    )


def qwen(folder: Path) -> Path:
    """Qwen 2 and 3: text is normalised (NFC), no BOS, PAD is the base model's EOS."""
    tokenizer = _bytes_bpe(_split_by_words(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.normalizer = normalizers.NFC()
    return write_tokenizer(
        folder,
        tokenizer,
        tokenizer_class="Qwen2Tokenizer",
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        add_bos_token=False,
    )


def _sentencepiece(special: list[str], bos: str) -> Tokenizer:
    """SentencePiece's BPE as transformers converts it, with bytes for what the vocabulary lacks."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    parts = json.loads(trained.to_str())
    vocabulary = parts["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    parts["model"].update(byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer.from_str(json.dumps({**parts, "pre_tokenizer": None}))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def llama(folder: Path) -> Path:
    """Llama 2: the normaliser puts a space before every text, and the decoder removes it."""
    tokenizer = _sentencepiece(["<unk>", "<s>", "</s>"], "<s>")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = _strips_first_space()
    return write_tokenizer(
        folder,
        tokenizer,
        tokenizer_class="LlamaTokenizer",
        bos_token="<s>",
        eos_token={"__type": "AddedToken", "content": "</s>"},
        unk_token="<unk>",
        add_bos_token=True,
        add_eos_token=True,
    )


def mistral(folder: Path) -> Path:
    """Mistral v3: as Llama 2, but the pre-tokenizer puts the space, and there are many control
    tokens."""
    controls = ["[INST]", "[/INST]", "[TOOL_CALLS]"]
    tokenizer = _sentencepiece(["<unk>", "<s>", "</s>", *controls], "<s>")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = _strips_first_space()
    return write_tokenizer(
        folder,
        tokenizer,
        tokenizer_class="LlamaTokenizer",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def gemma(folder: Path) -> Path:
    """Gemma: no space before a text; PAD and UNK of their own."""
    tokenizer = _sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>"], "<bos>")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return write_tokenizer(
        folder,
        tokenizer,
        tokenizer_class="GemmaTokenizer",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def _strips_first_space() -> decoders.Decoder:
    strip = decoders.Strip(" ", 1, 0)
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )


REAL: tuple[Callable[[Path], Path], ...] = (
    *(gpt2, smollm2, gpt2_without_special, llama3, qwen, llama, mistral, gemma),
)
