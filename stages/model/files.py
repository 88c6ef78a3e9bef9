"""Which files of a model folder are the model: those that loaders look for by name.

Folders have more: an index that was left behind, the same weights in the layout of another tool
(consolidated.safetensors), checkpoints below them. None of it is read. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from stages.run.layout import CONFIG_FILE, GENERATION_CONFIG_FILE, PICKLED_WEIGHTS

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
CONFIG_FILES = (CONFIG_FILE, GENERATION_CONFIG_FILE)
NAMES_SHOWN = 5


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the weights, the index first.

    The index and what it names, where all of that exists; else model.safetensors; else, so that the
    caller can say what is wrong with them, the index and all safetensors.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            named = sorted(set(weight_map(index).values()))
        except ValueError:
            named = []
        if named and all((folder / name).exists() for name in named):
            return [INDEX_FILE, *named]
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    return [INDEX_FILE] * index.is_file() + [path.name for path in _safetensors(folder)]


def model_files(folder: Path) -> list[Path]:
    """The files of `folder` that shape a model: its configs and its weights, or its pickles where
    it has no safetensors."""
    names = weight_files(folder)
    if not any(name.endswith(".safetensors") for name in names):
        names += [PICKLE_INDEX, *(path.name for path in folder.glob(PICKLED_WEIGHTS))]
    paths = (folder / name for name in (*CONFIG_FILES, "adapter_config.json", *names))
    return sorted({path for path in paths if path.is_file()})


def ignored_files(folder: Path) -> list[str]:
    """The weights and the index in `folder` that are not read because others are."""
    read = weight_files(folder)
    index = [INDEX_FILE] * (folder / INDEX_FILE).is_file()
    return [name for name in (*index, *(p.name for p in _safetensors(folder))) if name not in read]


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, from an index. Raises ValueError where it is not an index or names a file
    outside its folder."""
    try:
        content = json.loads(index.read_bytes())["weight_map"]
        files = {str(name): str(file) for name, file in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of weights: {error!r}.") from None
    outside = sorted({file for file in files.values() if Path(file).name != file})
    if outside:
        raise ValueError(
            "\n".join(
                [
                    f"{index} names files outside its folder, which are not opened.",
                    *listed("files", outside),
                ]
            )
        )
    return files


def listed(kind: str, items: Iterable[str]) -> list[str]:
    """One line, `kind (count): first, second, ...`, or none where there are no items."""
    names = list(items)
    more = f", and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return [f"{kind} ({len(names)}): {', '.join(names[:NAMES_SHOWN])}{more}"] if names else []


def _safetensors(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
