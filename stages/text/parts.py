"""Which files of a folder are the parts of one split, by their names, as `datasets` reads them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from itertools import count
from pathlib import PurePosixPath

from stages.run.errors import InputError
from stages.text.formats import FORMAT_NAMES, FORMATS

# The words that `datasets` finds splits by, between characters that are no letters.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_CANONICAL = {word: split for split, words in _WORDS.items() for word in words}
_WORD = re.compile(rf"(?:^|[^a-z])({'|'.join(_CANONICAL)})(?![a-z])")
# data/train_sft-00000-of-00003.parquet: what the Hub calls the files of a split.
_NUMBERED = re.compile(r"(?:^|/)([^/]*?)-(\d{5,})-of-(\d{5,})")
_NO_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "metadata.json")


def parts_of(folder: str, names: Collection[str], split: str) -> tuple[list[str], list[str]]:
    """The files among `names` (paths within `folder`) of `split`, sorted, and notes on the others.

    Where no name has a split's word, all files are of the split "train". Raises InputError where
    the split has no file, files of more than one format, or one that is missing.
    """
    data = [
        name
        for name in sorted(names)
        if name.lower().endswith(FORMATS) and PurePosixPath(name).name not in _NO_DATA
    ]
    if not data:
        raise InputError(
            f"{folder} holds no file of a dataset ({FORMAT_NAMES}) and no state.json, so "
            "`datasets` did not save it. Name a file, a folder of files, or a folder made by "
            "save_to_disk."
        )
    splits: dict[str, list[str]] = defaultdict(list)
    for name in data:
        splits[_split_of(name)].append(name)
    if list(splits) == [""]:
        splits = {"train": splits[""]}
    chosen = splits.get(split) or splits.get(_CANONICAL.get(split, ""))
    if not chosen or not split:
        raise InputError(
            f"{folder} has no files of the split {split!r}; by their names it has "
            f"{', '.join(one or 'others' for one in splits)}. Set DATASET_SPLIT."
        )
    _require_one_format(folder, chosen)
    _require_all(folder, chosen)
    notes = [f"split {split!r}: {_count(chosen)}, in this order: {_shown(chosen)}"]
    others = [f"{one or 'no split'} ({_count(files)})" for one, files in splits.items()]
    others = [text for text, files in zip(others, splits.values(), strict=True) if files != chosen]
    others += [_shown([name for name in names if name not in data])] * (len(names) > len(data))
    return chosen, notes + [f"not read: {', '.join(others)}"] * bool(others)


def _split_of(name: str) -> str:
    numbered = _NUMBERED.search(name)
    if numbered and PurePosixPath(name).parts[0] == "data" and _WORD.search(numbered[1].lower()):
        return _CANONICAL.get(numbered[1], numbered[1])
    words = _WORD.findall(name.lower())
    return _CANONICAL[words[-1]] if words else ""


def _require_one_format(folder: str, names: list[str]) -> None:
    suffixes = {
        next(suffix for suffix in FORMATS if name.lower().endswith(suffix)).removesuffix(".gz")
        for name in names
    }
    if len(suffixes) > 1:
        raise InputError(
            f"{folder} holds files of several formats: {', '.join(sorted(suffixes))}. Name one "
            "file, or move the others away: the same examples may be in each."
        )


def _require_all(folder: str, names: list[str]) -> None:
    """Raise InputError where files that number their parts (00000-of-00002) are not all here."""
    numbers: dict[tuple[str, int], set[int]] = defaultdict(set)
    for name in names:
        if found := _NUMBERED.search(name):
            begin = name[: found.start(2)]
            numbers[begin, int(found[3])].add(int(found[2]))
    for (begin, total), found_numbers in numbers.items():
        if missing := total - len(found_numbers):
            first = next(number for number in count() if number not in found_numbers)
            raise InputError(
                f"{folder}: {missing:,} of {total:,} parts are missing: {begin}{first:05}-of-"
                f"{total:05} is the first. Copy the whole dataset."
            )


def _count(names: list[str]) -> str:
    return f"{len(names):,} file{'s' if len(names) > 1 else ''}"


def _shown(names: Collection[str]) -> str:
    names = sorted(names)
    return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])
