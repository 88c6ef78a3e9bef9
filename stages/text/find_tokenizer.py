"""The tokenizer of MODEL_ID, for the data stage: from a folder or the Hub, converted if need be."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages.model.location import local_model
from stages.run.errors import InputError
from stages.run.layout import TOKENIZER_FILES
from stages.text.tokens import TOKENIZER_CONFIG, TextTokenizer, write_config

_MOST_IDS = 2**24  # in a vocabulary; the largest today have 2**18
_PLAIN = ("vocab.json", "vocab.txt")  # vocabularies that transformers reads by itself
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# What AutoTokenizer does for these, and neither training nor eval does: it removes spaces before
# signs from an answer (Llama 3 has that), and ends a prompt with EOS.
_NOT_DONE = ("clean_up_tokenization_spaces", "add_eos_token")
# A tokenizer of no model's own class also makes token_type_ids, which no model here takes:
# `transformers serve` then never answers.
_GENERIC = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_MODEL_INPUTS = ["input_ids", "attention_mask"]
_REMEDY = "Name a model whose folder has tokenizer.json"


def find_tokenizer(model: str, revision: str = "") -> TextTokenizer:
    """The tokenizer of a model's folder or Hub id. One without tokenizer.json is converted by
    transformers, which takes seconds."""
    folder = local_model(model)
    if folder is None:
        from stages.model.hub import download_files

        folder = download_files(model, revision, TOKENIZER_FILES)
    converted = not (folder / "tokenizer.json").is_file()
    tokenizer = _converted(model, folder) if converted else TextTokenizer.load(folder)
    if tokenizer.vocab_size > _MOST_IDS:
        raise InputError(
            f"MODEL_ID={model}: its tokenizer.json has ids up to "
            f"{tokenizer.vocab_size - 1:,}. Name another model."
        )
    if changes := _translate(tokenizer.files):
        print(
            f"note: MODEL_ID={model}: transformers 5 wrote its tokenizer_config.json, which "
            f"version 4 does not load. It is published so that both do: {', '.join(changes)}.",
            flush=True,
        )
    if changes := _not_done(tokenizer.files):
        print(
            f"note: MODEL_ID={model}: its tokenizer_config.json is published with "
            f"{', '.join(changes)}, so that AutoTokenizer reads prompts and answers as training "
            "and eval do.",
            flush=True,
        )
    return tokenizer


def _translate(files: dict[str, bytes]) -> list[str]:
    """Give tokenizer_config.json the names of transformers 4, which version 5 reads too; returns
    the changes. `load` has read the file, so it is a JSON object."""
    config, changes = json.loads(files.get(TOKENIZER_CONFIG, b"{}")), []
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        changes.append("tokenizer_class PreTrainedTokenizerFast")
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
        changes.append("additional_special_tokens")
    if changes:
        write_config(files, config)
    return changes


def _not_done(files: dict[str, bytes]) -> list[str]:
    """Switch off in tokenizer_config.json what AutoTokenizer alone does; returns the changes."""
    config = json.loads(files.get(TOKENIZER_CONFIG, b"{}"))
    names = [name for name in _NOT_DONE if config.get(name)]
    changes: dict[str, Any] = dict.fromkeys(names, False)
    made = [f"{name} false" for name in names]
    if "model_input_names" not in config and config.get("tokenizer_class") in _GENERIC:
        changes["model_input_names"] = _MODEL_INPUTS
        made.append(f"model_input_names {' '.join(_MODEL_INPUTS)}")
    if changes:
        write_config(files, {**config, **changes})
    return made


def _converted(model: str, folder: Path) -> TextTokenizer:
    files = {path.name for path in folder.iterdir()}
    if not files & {*_PLAIN, *_SENTENCEPIECE}:
        raise InputError(
            f"MODEL_ID={model}: it has no tokenizer.json, and nothing to make one of "
            f"({', '.join((*_PLAIN, *_SENTENCEPIECE))}). {_REMEDY}."
        )
    if not files & {*_PLAIN} and importlib.util.find_spec("sentencepiece") is None:
        only = min(files & {*_SENTENCEPIECE})
        raise InputError(
            f"MODEL_ID={model}: its tokenizer is only a {only}, whose conversion needs "
            f"the package sentencepiece, which is not installed. {_REMEDY}, or convert it once "
            "where sentencepiece and transformers are: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    from transformers import AutoTokenizer

    with TemporaryDirectory() as converted:
        try:
            AutoTokenizer.from_pretrained(
                folder, use_fast=True, trust_remote_code=False
            ).save_pretrained(converted)
            return TextTokenizer.load(Path(converted))
        # The converters of transformers raise anything for files that are not what they expect.
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip(" ()")]
            reason = lines[0] if lines else type(error).__name__  # the rest is advice
            raise InputError(
                f"MODEL_ID={model}: its files give no tokenizer ({reason}). {_REMEDY}."
            ) from None
