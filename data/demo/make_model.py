"""Makes data/demo/model again: a tokenizer trained on the demo's text, and the config of a tiny
Llama without weights.

    .venv/bin/python data/demo/make_model.py

The folder ships with the project, so that the demo starts at once; it changes only when demo.jsonl
does.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 2048  # enough that most of the demo's words are one piece


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: every text can be encoded, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = [(BOS, tokenizer.token_to_id(BOS))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=begin
    )
    return tokenizer


def main() -> None:
    rows = [
        json.loads(line) for line in (HERE / "demo.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    headers = ["### Instruction\n", "\n\n### Context\n", "\n\n### Answer\n"]
    tokenizer = train_tokenizer(headers + [text for row in rows for text in row.values()])
    folder = HERE / "model"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    ).save_pretrained(folder)
    ids = {
        name: tokenizer.token_to_id(token)
        for name, token in (("bos", BOS), ("eos", EOS), ("pad", PAD))
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **{f"{name}_token_id": number for name, number in ids.items()},
    )
    config.save_pretrained(folder)
    GenerationConfig(
        **{f"{name}_token_id": number for name, number in ids.items()}
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
