"""What a user should know about a base model and its tokenizer, as lines to print. Nothing here
changes what a stage publishes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.model.config import (
    PUBLISHED_GENERATION_KEYS,
    generation_config,
    translated_config,
)
from stages.model.files import CONFIG_FILES
from stages.model.location import local_model
from stages.run.errors import InputError, StageFailure
from stages.run.layout import CONFIG_FILE, GENERATION_CONFIG_FILE
from stages.run.settings import Settings
from stages.text.tokens import TextTokenizer


def model_notes(settings: Settings, tokenizer: TextTokenizer, end: int) -> list[str]:
    """The lines for MODEL_ID; fetches its configs where it is on the Hub. A config.json that cannot
    be had or read is left to the stage that needs it. `end`: the id that ends an answer."""
    try:
        folder = local_model(settings.model_id)
        if folder is None:
            from stages.model.hub import download_files

            folder = download_files(settings.model_id, settings.model_revision, CONFIG_FILES)
        _, changes = translated_config(folder)
        lines = [f"{CONFIG_FILE}, {change}." for change in changes]
        lines += published_notes(folder, tokenizer, end)
    except (InputError, StageFailure):
        return []
    return [f"note: MODEL_ID={settings.model_id}: {line}" for line in lines]


def published_notes(folder: Path, tokenizer: TextTokenizer, end: int) -> Iterator[str]:
    """Where the model that is published behaves in another way than its base in `folder`: the end
    of an answer and settings of generation.

    Raises StageFailure where a config is damaged.
    """
    others = {
        name: ids
        for name, ids in _ends(folder).items()
        if ids != [end] and (ids or name == CONFIG_FILE)
    }
    if others:
        says = " and ".join(
            f"{name} ends an answer at {_shown(ids, tokenizer)}" for name, ids in others.items()
        )
        yield (
            f"{says}. The model is trained to end one at {_shown([end], tokenizer)}, and the "
            "published files name only that."
        )
    if (folder / GENERATION_CONFIG_FILE).is_file():
        others = {
            name: value
            for name, value in generation_config(folder).items()
            if value is not None
            and name not in PUBLISHED_GENERATION_KEYS
            and not name.startswith("_")  # of transformers' own bookkeeping
        }
        if others:
            settings = ", ".join(f"{name}={value}" for name, value in others.items())
            yield (
                f"{GENERATION_CONFIG_FILE} has {settings}. eval does not apply that, and the "
                "published file does not have it: plain transformers answers as eval does."
            )


def tokenizer_notes(folder: Path, tokenizer: TextTokenizer) -> Iterator[str]:
    """Where AutoTokenizer, reading the published `folder`, begins a prompt in another way than
    training and eval do: its classes differ in which of two contradicting settings they follow."""
    from transformers import AutoTokenizer

    [first], word = tokenizer.encode_after([""], ["a"]), "AutoTokenizer"
    ours = [*tokenizer.bos, *(first.ids or ())]
    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)("a").input_ids
    except Exception as error:  # its classes raise anything
        yield f"{word} cannot read the published tokenizer ({error!r}); training and eval can."
        return
    if theirs != ours:
        yield (
            f"{word} makes the ids {theirs} of the prompt 'a', training and eval make {ours}: "
            "add_bos_token in the model's tokenizer_config.json and its tokenizer.json contradict "
            "each other. Asking the model through it needs care for the first token."
        )


def _ends(folder: Path) -> dict[str, list[Any]]:
    """File -> the ids at which it ends an answer, none where it names none."""
    configs = {CONFIG_FILE: translated_config(folder)[0]}
    if (folder / GENERATION_CONFIG_FILE).is_file():
        configs[GENERATION_CONFIG_FILE] = generation_config(folder)
    found = {name: config.get("eos_token_id") for name, config in configs.items()}
    return {
        name: ids if isinstance(ids, list) else [] if ids is None else [ids]
        for name, ids in found.items()
    }


def _shown(ids: list[Any], tokenizer: TextTokenizer) -> str:
    return ", ".join(f"{id} ({tokenizer.spelling(id)!r})" for id in ids) or "no token"
