"""config.json as this project's transformers reads it, whichever version wrote it.

transformers 5 writes keys that version 4 drops without a word, and old scripts wrote values that
version 4 takes only in part. `translated` gives each of them its one meaning, with a line for each
change. Standard library only.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.run.errors import StageFailure
from stages.run.layout import CONFIG_FILE, GENERATION_CONFIG_FILE

# What transformers 4 moves from a model's config to its generation_config.json, or refuses to save.
GENERATION_KEYS = (
    *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample"),
    *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
    *("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"),
    *("output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate"),
    *("suppress_tokens", "temperature", "top_k", "top_p", "typical_p"),
)
# What a published generation_config.json says: nothing else that would make `generate` answer in
# another way than eval does.
PUBLISHED_GENERATION_KEYS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"),
    *("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens"),
)
# Special tokens for which some tools write -1: none.
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Where transformers 5 has these in its RoPE's parameters, version 4 has them as keys of their own.
_BESIDE_ROPE = ("rope_theta", "partial_rotary_factor")
_NO_NUMBERS = ("model_type", "transformers_version", "_name_or_path")


def translated_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """`translated`, of the config.json in `folder`. Raises StageFailure where there is none, or
    none that can be read."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise StageFailure(
            f"{folder} has no config.json, which describes the weights. Name a "
            "complete model folder."
        )
    try:
        return translated(json.loads(path.read_bytes()))
    except StageFailure as failure:
        raise StageFailure(f"{path} cannot be used: {failure}") from failure
    except (ValueError, TypeError, RecursionError) as error:
        raise StageFailure(f"{path} cannot be used: {error!r}") from error


def generation_config(folder: Path) -> dict[str, Any]:
    """The content of generation_config.json; raises StageFailure where it is no JSON object."""
    path = folder / GENERATION_CONFIG_FILE
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StageFailure(
            f"{path} cannot be used: {error!r}. Correct it, or remove it."
        ) from error


def published_generation_config(folder: Path, eos: int) -> dict[str, Any]:
    """What of the generation_config.json in `folder` is published: an answer ends at `eos`."""
    settings = generation_config(folder)
    kept = {name: settings[name] for name in settings if name in PUBLISHED_GENERATION_KEYS}
    return {**kept, "eos_token_id": eos}


def translated(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """config.json's content as transformers 4 reads it, and a line for each change.

    Settings of generation are taken out: `generation_settings` returns them. Raises StageFailure
    for RoPE that version 4 cannot express, and where two keys contradict each other.
    """
    values = copy.deepcopy(dict(config))
    lines = [*_numbers(values), *_rope(values), *_no_tokens(values)]
    if moved := generation_settings(values):
        values = {name: value for name, value in values.items() if name not in moved}
        lines.append(
            f"{', '.join(moved)}: settings of generation, which belong in generation_config.json"
        )
    return values, lines


def generation_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of generation in a config.json, as models before 2023 have them."""
    return {name: config[name] for name in GENERATION_KEYS if name in config}


def _numbers(values: dict[str, Any]) -> Iterator[str]:
    """Replace numbers that are written as text; yields a line for each."""
    nested = (values.get("rope_parameters"), values.get("rope_scaling"))
    for table in (values, *(part for part in nested if isinstance(part, dict))):
        for name, value in list(table.items()):
            number = None if name in _NO_NUMBERS else _number(value)
            if number is not None:
                table[name] = number
                yield f'{name} is the text "{value}": read as the number {number}'


def _number(value: Any) -> int | float | None:
    if not isinstance(value, str):
        return None
    try:
        number = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return number if type(number) in (int, float) else None


def _rope(values: dict[str, Any]) -> Iterator[str]:
    """Give RoPE the keys of transformers 4: rope_theta and rope_scaling. Yields a line if that
    changes anything."""
    before = {name: values.get(name) for name in (*_BESIDE_ROPE, "rope_scaling")}
    for source in ("rope_parameters", "rope_scaling"):
        rope = values.get(source)
        if isinstance(rope, dict):
            _take_apart(values, source, dict(rope))
        elif source == "rope_parameters":
            values.pop(source, None)
    after = {name: values.get(name) for name in before}
    if after != before:
        changes = ", ".join(
            f"{name} {json.dumps(value)}" for name, value in after.items() if value != before[name]
        )
        yield f"RoPE as transformers 5 writes it: read as {changes}"


def _take_apart(values: dict[str, Any], source: str, rope: dict[str, Any]) -> None:
    """Move what `rope`, the value of the key `source`, says to the keys of transformers 4."""
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise StageFailure(
            f"{source} gives {', '.join(nested)} a RoPE each, which this version of transformers "
            "cannot read. Choose a model with one RoPE for all layers."
        )
    for name in _BESIDE_ROPE:
        if name in rope:
            _set(values, name, rope.pop(name), source)
    if values.get("partial_rotary_factor") == 1:
        del values["partial_rotary_factor"]  # the default; few architectures know the key
    if source == "rope_scaling":
        values[source] = rope or None
        return
    del values[source]
    scaling = None if rope.get("rope_type", rope.get("type", "default")) == "default" else rope
    if scaling is not None:
        _set(values, "rope_scaling", scaling, source)
    elif _scales(values.get("rope_scaling")):
        _set(values, "rope_scaling", None, source)


def _scales(rope: Any) -> bool:
    return (
        isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) != "default"
    )


def _set(values: dict[str, Any], name: str, value: Any, source: str) -> None:
    """Set a key that transformers 5 has in `source`; raises StageFailure if the key says another
    thing."""
    existing = values.get(name)
    if existing is not None and _comparable(existing) != _comparable(value):
        raise StageFailure(
            f"{name} is {json.dumps(existing)}, and {source} says {json.dumps(value)}. Remove the "
            "one that is wrong."
        )
    values[name] = value


def _comparable(value: Any) -> Any:
    """`value` without what two spellings of the same RoPE differ in."""
    if not isinstance(value, dict):
        return value
    rope = {name: part for name, part in value.items() if name not in ("type", *_BESIDE_ROPE)}
    return {**rope, "rope_type": value.get("rope_type", value.get("type"))}


def _no_tokens(values: dict[str, Any]) -> Iterator[str]:
    for name in TOKEN_KEYS:
        if type(values.get(name)) is int and values[name] < 0:
            yield f"{name} {values[name]}: read as none"
            values[name] = None
