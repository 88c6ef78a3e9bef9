"""Open a dataset on this machine: one file, or a folder that `datasets` saved.

A `Source` yields raw records, one at a time; `examples` checks them. Only the standard library is
imported unless the format needs more.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.run.errors import InputError
from stages.text import formats
from stages.text.formats import Record

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
# What reading a JSON file of a saved dataset raises when the file holds something else.
_NOT_SAVED = (ValueError, KeyError, TypeError, RecursionError)


@dataclass(frozen=True)
class Source:
    """An opened dataset.

    `columns` is None where each record has its own (JSON); `unit` is what a record's number counts.
    """

    name: str
    unit: str
    columns: list[str] | None
    records: Iterator[tuple[int, Record]]


def open_local(path: Path, split: str, wanted: list[str]) -> Source:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return open_saved(str(path), lambda name: _open_within(path, name), split, wanted)
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is neither a file nor a folder.")
        return open_file(str(path), lambda: path.open("rb"), wanted)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None


def _open_within(folder: Path, name: str) -> Any:
    """Open a file of a saved dataset in binary.

    A link out of the folder is refused: the author of a dataset must not choose files of this
    machine.
    """
    file = folder / name
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)):
        raise InputError(
            f"{file} is a link to a file outside its folder. Replace it with the file itself."
        )
    if file.exists() and not file.is_file():
        raise InputError(f"{file} is not a file.")
    return file.open("rb")


def open_file(name: str, open_binary: Callable[[], Any], wanted: list[str]) -> Source:
    """A dataset in one file, whose suffix gives the format; `open_binary()` opens it."""
    if not name.lower().endswith(FORMATS):
        remedy = (
            " Unpack it first." if name.endswith((".gz", ".zip", ".zst", ".bz2", ".xz")) else ""
        )
        raise InputError(f"{name}: a dataset's file ends in {', '.join(FORMATS)}.{remedy}")
    file = open_binary()
    try:
        if name.lower().endswith(".csv"):
            return Source(name, "line", *formats.csv_records(file))
        if name.lower().endswith(".parquet"):
            return Source(name, "row", *formats.parquet_records(file, wanted))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if formats.holds_array(file):
        return Source(name, "row", None, formats.json_array(file))
    return Source(name, "line", None, formats.json_lines(file))


def open_saved(
    folder: str, open_binary: Callable[[str], Any], split: str, wanted: list[str]
) -> Source:
    """A folder that `datasets` saved (save_to_disk): one dataset, or one per split.

    `open_binary(name)` opens one of its files. The folder holds Arrow streams, which state.json
    names. It is read without `datasets`, whose import costs a second and which first copies a
    dataset on S3 to the disk.
    """

    def content(name: str) -> Any:
        with open_binary(name) as file:
            return json.load(file)

    prefix = ""
    try:
        splits = content("dataset_dict.json")["splits"]
        if split not in splits or Path(split).name != split or split == "..":
            raise InputError(
                f"{folder} has no split {split!r}; it has {', '.join(splits)}. Set DATASET_SPLIT."
            )
        prefix = f"{split}/"
    except FileNotFoundError:
        pass  # one dataset, without splits
    except _NOT_SAVED as error:
        raise InputError(
            f"{folder}/dataset_dict.json is not what `datasets` writes ({error!r})."
        ) from None
    try:
        names = [entry["filename"] for entry in content(f"{prefix}state.json")["_data_files"]]
    except FileNotFoundError:
        remedy = f"Name a file ({', '.join(FORMATS)}) or a folder made by save_to_disk."
        raise InputError(
            f"{folder} is a folder without state.json, so `datasets` did not save it. {remedy}"
        ) from None
    except _NOT_SAVED as error:
        raise InputError(
            f"{folder}/{prefix}state.json is not what `datasets` writes ({error!r})."
        ) from None
    if any(
        not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name
        for name in names
    ):
        raise InputError(f"{folder}/{prefix}state.json names data files outside its folder.")
    return _arrow_files(folder, [prefix + name for name in names], open_binary, wanted)


def _arrow_files(
    folder: str, names: list[str], open_binary: Callable[[str], Any], wanted: list[str]
) -> Source:
    def stream(name: str) -> tuple[list[str], Iterator[tuple[int, Record]]]:
        try:
            file = open_binary(name)
        except FileNotFoundError:
            raise InputError(
                f"{folder}/{name} is missing: the saved dataset is incomplete."
            ) from None
        try:
            return formats.arrow_records(file, wanted)
        except InputError as error:
            raise InputError(f"{folder}/{name}: {error}") from None

    def records() -> Iterator[tuple[int, Record]]:
        previous = 0
        for name in names:
            number = 0
            for number, record in stream(name)[1]:
                yield previous + number, record
            previous += number

    columns = stream(names[0])[0] if names else []
    return Source(folder, "row", columns, records())
