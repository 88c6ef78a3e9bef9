"""A model folder to damage, and the training that it is given to."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stages.backends.torch import train as torch_train
from stages.model.weights import INDEX_FILE, SINGLE_FILE
from stages.run.settings import Settings
from tests.tiny_llama import tiny_llama

Damage = Callable[[Path], object]
NORM = "model.norm.weight"
TABLE = "model.layers.0.self_attn.rotary_emb.inv_freq"
PICKLE = "pytorch_model.bin"
SOMETHING = b"not what it should be"


def config(**changes: Any) -> Damage:
    """The config with other values; None removes one."""

    def damage(folder: Path) -> None:
        values = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(
            json.dumps({name: value for name, value in values.items() if value is not None})
        )

    return damage


def file(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / SINGLE_FILE)
        change(found)
        save_file(found, folder / SINGLE_FILE, metadata={"format": "pt"})

    return damage


def cut(bytes_left: int) -> Damage:
    return lambda folder: os.truncate(folder / SINGLE_FILE, bytes_left)


def header(text: str | dict, length: int | None = None, data: int = 8) -> Damage:
    """A file of weights with this header, which says that it has this length, and some bytes of
    data."""
    encoded = (text if isinstance(text, str) else json.dumps(text)).encode()
    return file(
        SINGLE_FILE,
        struct.pack("<Q", len(encoded) if length is None else length) + encoded + bytes(data),
    )


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def twice(first: dict[str, Any], second: dict[str, Any]) -> str:
    """A header with two entries of one name, which no dict has."""
    return f'{{"a": {json.dumps(first)}, "a": {json.dumps(second)}}}'


def in_parts(folder: Path) -> None:
    (folder / SINGLE_FILE).unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="30KB")


def in_two_parts(folder: Path) -> None:
    """The same tensor in every part."""
    for path in folder.glob("model-*.safetensors"):
        found = {**load_file(path), NORM: torch.ones(32)}
        save_file(found, path, metadata={"format": "pt"})


def index(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        in_parts(folder)
        content = json.loads((folder / INDEX_FILE).read_text())
        change(content)
        (folder / INDEX_FILE).write_text(json.dumps(content))

    return damage


def placed_at(place: str) -> Damage:
    return index(lambda content: content["weight_map"].update({NORM: place}))


def in_place_of_weights(make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / SINGLE_FILE).unlink()
        make(folder / SINGLE_FILE)

    return damage


def and_then(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for each in damages:
            each(folder)

    return damage


DIFFERS = (
    r"the weights are not those of the model that its config\.json describes\. Fetch both "
    r"again from one place\.\n"
)


def train(folder: Path | str, vocabulary: int = 67, **changes: Any) -> None:
    """The stage's work up to its first process, on rows that need `vocabulary` ids."""
    data = Path(folder).parent / "data"
    data.mkdir(exist_ok=True)
    (data / "manifest.json").write_text(
        json.dumps({"metrics": {"vocabulary": vocabulary, "train": {"rows": 8}}})
    )
    settings = replace(Settings(), model_id=str(folder), max_length=32, **changes)
    torch_train.train(settings, data, data, Path(folder).parent / "work")
