"""Which files of a model folder are the model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest

from stages.model import base
from stages.model.files import INDEX_FILE, SINGLE_FILE, ignored_files, model_files, weight_files
from stages.run.settings import Settings

PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write(folder: Path, *names: str, index: tuple[str, ...] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    if index:
        content = {"weight_map": {f"tensor {name}": name for name in index}}
        (folder / INDEX_FILE).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "names, index, read, ignored",
    [
        ([SINGLE_FILE], (), [SINGLE_FILE], []),
        (PARTS, PARTS, [INDEX_FILE, *PARTS], []),
        ([SINGLE_FILE], PARTS, [SINGLE_FILE], [INDEX_FILE]),
        ([SINGLE_FILE, PARTS[0]], PARTS, [SINGLE_FILE], [INDEX_FILE, PARTS[0]]),
        ([*PARTS, SINGLE_FILE], PARTS, [INDEX_FILE, *PARTS], [SINGLE_FILE]),
        (
            [SINGLE_FILE, "consolidated.safetensors", "model.fp16.safetensors"],
            (),
            [SINGLE_FILE],
            ["consolidated.safetensors", "model.fp16.safetensors"],
        ),
        ([PARTS[0]], PARTS, [INDEX_FILE, PARTS[0]], []),  # refused later: a part is missing
        (PARTS, (), [*PARTS], []),  # refused later: no index
        ([], (), [], []),
    ],
)
def test_the_weights_are_what_the_index_names_or_else_the_single_file(
    tmp_path: Path, names: list[str], index: tuple[str, ...], read: list[str], ignored: list[str]
) -> None:
    folder = write(tmp_path, *names, index=index)
    assert weight_files(folder) == read
    assert ignored_files(folder) == ignored


def test_a_model_is_its_configs_and_its_weights(tmp_path: Path) -> None:
    own = ("config.json", "generation_config.json", SINGLE_FILE)
    others = ("manifest.json", "prompt.json", "tokenizer.json", "pytorch_model.bin")
    below = ("checkpoint-5/model.safetensors", "checkpoint-5/config.json")
    folder = write(tmp_path, *own, *others, *below, "consolidated.safetensors")
    assert sorted(path.name for path in model_files(folder)) == sorted(own)
    (folder / SINGLE_FILE).unlink()
    (folder / "consolidated.safetensors").unlink()
    assert {path.name for path in model_files(folder)} == {*own[:2], "pytorch_model.bin"}


@pytest.mark.parametrize(
    "names, index, fetched",
    [
        ([SINGLE_FILE, "consolidated.safetensors"], (), {SINGLE_FILE}),
        ([*PARTS, "consolidated.safetensors", SINGLE_FILE], PARTS, {INDEX_FILE, *PARTS}),
        ([SINGLE_FILE], PARTS, {INDEX_FILE, SINGLE_FILE}),
    ],
)
def test_no_second_copy_of_the_weights_is_fetched(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    index: tuple[str, ...],
    fetched: set[str],
) -> None:
    hub, cache = write(tmp_path / "hub", *names, index=index), write(tmp_path / "cache")

    def download(model: str, revision: str, patterns: tuple[str, ...]) -> Path:
        for path in hub.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in patterns):
                shutil.copyfile(path, cache / path.name)
        return cache

    monkeypatch.setattr(base, "download_files", download)
    assert base._fetched(replace(Settings(), model_id="owner/model")) == cache
    assert {path.name for path in cache.iterdir()} == fetched
