"""Read the headers of a model folder's safetensors files: the names, shapes, dtypes and files of
its tensors. No weight is read.

The files may come from anyone: a damaged or false header, a link to a missing file and a wrong
index become lines in `Headers.problems`, not exceptions, because the caller knows whose fault they
are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stages.model.weights import DTYPE_NAMES, INDEX_FILE, SINGLE_FILE, TensorSpec

NAMES_SHOWN = 5


@dataclass
class Headers:
    """The tensors of a folder, the name of each tensor's file, and the problems."""

    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_headers(folder: Path) -> Headers:
    """The headers of all safetensors files in `folder`, compared with its index."""
    headers = Headers()
    for path in sorted(folder.glob("*.safetensors")):
        headers.problems += _read_header(path, headers)
    if not headers.problems:
        headers.problems += _index_problems(folder, headers)
    return headers


def listed(kind: str, items: Iterable[str]) -> list[str]:
    """One line, `kind (count): first, second, ...`, or none where there are no items."""
    names = list(items)
    more = f", and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return [f"{kind} ({len(names)}): {', '.join(names[:NAMES_SHOWN])}{more}"] if names else []


def _read_header(path: Path, headers: Headers) -> Iterator[str]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():  # opening a pipe would wait
        yield f"{path} is not a file, or is a broken link."
        return
    unknown = []
    try:
        with safe_open(path, framework="numpy") as file:
            if "DCP_SHARDING_INFO" in (file.metadata() or {}):
                yield f"{path} holds parts of tensors (DCP_SHARDING_INFO), not a model's weights."
            for name in file.keys():  # noqa: SIM118 (not a dict)
                entry = file.get_slice(name)
                if name in headers.files:
                    yield f"{path.parent}: {name} is in {headers.files[name]} and in {path.name}."
                headers.files[name] = path.name
                if entry.get_dtype() in DTYPE_NAMES:
                    headers.tensors[name] = TensorSpec(
                        name, tuple(entry.get_shape()), DTYPE_NAMES[entry.get_dtype()]
                    )
                else:
                    unknown.append(f"{name} {entry.get_dtype()}")
    # Also raised when the file is shorter or longer than its header says.
    except (SafetensorError, OSError, ValueError) as error:
        yield f"{path} is damaged: {error}."
    yield from listed(f"{path}: of a dtype that is not supported", unknown)


def _index_problems(folder: Path, headers: Headers) -> Iterator[str]:
    path = folder / INDEX_FILE
    if not path.exists():
        files = set(headers.files.values())
        if files != {SINGLE_FILE}:
            yield (
                f"{folder} holds {sorted(files) or 'no weights'} and no {INDEX_FILE}: loaders "
                f"look for {SINGLE_FILE}."
            )
        return
    try:
        file_of = weight_map(path)
    except ValueError as error:
        yield str(error)
        return
    misplaced = [
        f"{name} (index: {file_of.get(name, 'nowhere')}, file: {headers.files.get(name, 'none')})"
        for name in {**file_of, **headers.files}
        if file_of.get(name) != headers.files.get(name)
    ]
    if misplaced:
        yield "\n".join(
            [f"{path} does not match the files next to it.", *listed("misplaced", misplaced)]
        )


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
