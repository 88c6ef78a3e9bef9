"""Open a dataset on this machine: a file, a folder of files, or one that `datasets` saved.

A `Source` yields raw records, one at a time; `examples` checks them. Only the standard library is
imported unless the format needs more.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.run.digests import files_below
from stages.run.errors import InputError
from stages.text import formats, tables
from stages.text.csv_format import csv_records
from stages.text.encodings import open_text
from stages.text.formats import FORMAT_NAMES, Record
from stages.text.parts import parts_of

FORMATS = formats.FORMATS
# What reading a JSON file of a saved dataset raises when the file holds something else.
_NOT_SAVED = (ValueError, KeyError, TypeError, RecursionError)


@dataclass(frozen=True)
class Source:
    """An opened dataset.

    `columns` is None where each record has its own (JSON). `records` yields each record's place
    ("rows.csv, line 3") and the record. `notes`: what was found out about its format, and what of
    it is not read.
    """

    name: str
    columns: list[str] | None
    records: Iterator[tuple[str, Record]]
    notes: tuple[str, ...] = ()

    def read(self) -> Iterator[tuple[str, Record]]:
        """The records; raises InputError where reading them fails."""
        try:
            yield from self.records
        except OSError as error:
            raise InputError(f"{self.name} cannot be read to its end: {error}.") from None

    def without_splits(self, split: str) -> Source:
        """This source, which has no splits, with a note where another than "train" was chosen."""
        if split == "train":
            return self
        note = f"has no splits, so all of it is read, whatever DATASET_SPLIT={split} chooses"
        return replace(self, notes=(note, *self.notes))


def placed(
    name: str, unit: str, records: Iterable[tuple[int, Record]]
) -> Iterator[tuple[str, Record]]:
    """The records with their places; `unit` is what a record's number counts."""
    return ((f"{name}, {unit} {number}", record) for number, record in records)


def open_local(path: Path, split: str, wanted: list[str]) -> Source:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return open_folder(
                str(path),
                lambda: [file.relative_to(path).as_posix() for file in files_below(path)],
                lambda name: _open_within(path, name),
                split,
                wanted,
            )
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is neither a file nor a folder.")
        return open_file(str(path), lambda: path.open("rb"), wanted).without_splits(split)
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
    suffix = name.lower()
    if not suffix.endswith(FORMATS):
        packed = suffix.endswith((".gz", ".zip", ".zst", ".bz2", ".xz"))
        sheet = suffix.endswith((".xls", ".xlsx", ".ods"))
        remedy = " Unpack it first." if packed else " Save it as CSV." if sheet else ""
        raise InputError(f"{name}: a dataset's file ends in {FORMAT_NAMES}.{remedy}")
    file, unit, notes = open_binary(), "line", list[str]()
    columns: list[str] | None = None
    try:
        if suffix.endswith(".parquet"):
            unit, (columns, records) = "row", tables.parquet_records(file, wanted)
        else:
            file, notes = open_text(file)
            kind = suffix.removesuffix(".gz")
            if kind.endswith((".csv", ".tsv")):
                usual = "\t" if kind.endswith(".tsv") else ","
                columns, records, more = csv_records(file, wanted, usual)
            else:
                unit, records, more = formats.json_records(file, wanted)
            notes += more
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return Source(name, columns, placed(name, unit, records), tuple(notes))


def open_folder(
    folder: str,
    names: Callable[[], list[str]],
    open_binary: Callable[[str], Any],
    split: str,
    wanted: list[str],
) -> Source:
    """A folder that `datasets` saved, or whose files (`names()`, within it) are the parts of a
    dataset. `open_binary(name)` opens one of them."""
    saved = open_saved(folder, open_binary, split, wanted)
    return saved or _open_parts(folder, names(), open_binary, split, wanted)


def _open_parts(
    folder: str, names: list[str], open_binary: Callable[[str], Any], split: str, wanted: list[str]
) -> Source:
    """The files of one split as one dataset. Its columns are those of the first file; where another
    lacks one, its examples do."""
    chosen, notes = parts_of(folder, names, split)

    def part(name: str) -> Source:
        return open_file(f"{folder}/{name}", lambda: open_binary(name), wanted)

    first = part(chosen[0])

    def records() -> Iterator[tuple[str, Record]]:
        yield from first.records
        for name in chosen[1:]:
            following = part(name)
            if following.notes != first.notes:
                raise InputError(
                    f"{following.name} is written in another way than {first.name}: "
                    f"{'; '.join(following.notes) or 'the usual one'}, not "
                    f"{'; '.join(first.notes) or 'the usual one'}. Write all parts alike."
                )
            yield from following.records

    return Source(folder, first.columns, records(), (*notes, *first.notes))


def open_saved(
    folder: str, open_binary: Callable[[str], Any], split: str, wanted: list[str]
) -> Source | None:
    """A folder that `datasets` saved (save_to_disk): one dataset, or one per split. None for a
    folder of another kind.

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
        if prefix:
            raise InputError(
                f"{folder}/{prefix}state.json is missing: the saved dataset is incomplete."
            ) from None
        return None
    except _NOT_SAVED as error:
        raise InputError(
            f"{folder}/{prefix}state.json is not what `datasets` writes ({error!r})."
        ) from None
    if any(
        not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name
        for name in names
    ):
        raise InputError(f"{folder}/{prefix}state.json names data files outside its folder.")
    source = _arrow_files(folder, [prefix + name for name in names], open_binary, wanted)
    return source if prefix else source.without_splits(split)


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
            return tables.arrow_records(file, wanted)
        except InputError as error:
            raise InputError(f"{folder}/{name}: {error}") from None

    def numbered() -> Iterator[tuple[int, Record]]:
        previous = 0
        for name in names:
            number = 0
            for number, record in stream(name)[1]:
                yield previous + number, record
            previous += number

    columns = stream(names[0])[0] if names else []
    return Source(folder, columns, placed(folder, "row", numbered()))
