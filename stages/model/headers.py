"""Read the headers of a model folder's safetensors files: the names, shapes, dtypes and files of
its tensors. No weight is read.

The files may come from anyone: a damaged or false header, a link to a missing file and a wrong
index become lines in `Headers.problems`, not exceptions, because the caller knows whose fault they
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stages.model.files import INDEX_FILE, SINGLE_FILE, listed, weight_map
from stages.model.weights import DTYPE_NAMES, TensorSpec


@dataclass
class Headers:
    """The tensors of a folder, the name of each tensor's file, and the problems."""

    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_headers(folder: Path, names: Iterable[str] | None = None) -> Headers:
    """The headers of safetensors files in `folder`, compared with its index: those that `names`
    has, as `weight_files` gives them, or all."""
    if names is None:
        names = [path.name for path in folder.glob("*.safetensors")]
        names += [INDEX_FILE] * (folder / INDEX_FILE).exists()
    names, headers = {*names}, Headers()
    for name in sorted(names - {INDEX_FILE}):
        headers.problems += _read_header(folder / name, headers)
    if not headers.problems:
        headers.problems += _index_problems(folder, headers, INDEX_FILE in names)
    return headers


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


def _index_problems(folder: Path, headers: Headers, has_index: bool) -> Iterator[str]:
    path = folder / INDEX_FILE
    if not has_index:
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
