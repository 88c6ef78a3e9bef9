"""What the safetensors files of a model folder say that they hold: names, shapes and dtypes, and
where each lies. No weight is read.

A file is one that somebody gave: a header that is damaged or that lies, a file that is not the
folder's own and an index of something else become lines in `Headers.problems`, not exceptions. The
caller knows whose fault they are.
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
    """The tensors of a folder, the name of the file in which each lies, and what is wrong."""

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
    every = list(items)
    more = f", and {len(every) - NAMES_SHOWN} more" if len(every) > NAMES_SHOWN else ""
    return [f"{kind} ({len(every)}): {', '.join(every[:NAMES_SHOWN])}{more}"] if every else []


def _read_header(path: Path, headers: Headers) -> Iterator[str]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():  # a pipe would be waited for
        yield f"{path} is not a file, or a link that leads nowhere."
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
    except (
        SafetensorError,
        OSError,
        ValueError,
    ) as error:  # also when the file is shorter or longer than its header says
        yield f"{path} is damaged: {error}."
    yield from listed(f"{path}: of a dtype that nothing here reads or writes", unknown)


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
        places = weight_map(path)
    except ValueError as error:
        yield str(error)
        return
    wrong = [
        f"{name} (index: {places.get(name, 'nowhere')}, file: {headers.files.get(name, 'none')})"
        for name in {**places, **headers.files}
        if places.get(name) != headers.files.get(name)
    ]
    if wrong:
        yield "\n".join(
            [f"{path} does not match the files beside it.", *listed("misplaced", wrong)]
        )


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index gives them. Raises ValueError for what is no index, or names a
    file that is not next to it."""
    try:
        content = json.loads(index.read_bytes())["weight_map"]
        places = {str(name): str(file) for name, file in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of weights: {error!r}.") from None
    outside = sorted({file for file in places.values() if Path(file).name != file})
    if outside:
        raise ValueError(
            "\n".join(
                [
                    f"{index} names files that are not beside it, and those are not opened.",
                    *listed("files", outside),
                ]
            )
        )
    return places
