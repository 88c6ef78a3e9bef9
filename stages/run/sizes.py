"""Sizes in bytes, and durations, as people write them. Standard library only."""

from __future__ import annotations

import re

from stages.run.errors import InputError

# Decimal units as Hugging Face reads them in max_shard_size (5GB = 5 x 10^9), and the binary ones.
UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

SECONDS = {"s": 1, "min": 60, "h": 3600}


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200 MB`, `1GiB` or a plain number; raises InputError for anything else, and
    for less than one byte."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None or match[2].upper() not in UNITS:
        raise InputError(
            f"{text[:60]!r} is not a size. Write a number and a unit, such as 5GB, 200MB or 1GiB."
        )
    size = int(float(match[1]) * UNITS[match[2].upper()])
    if size < 1:
        raise InputError(f"{text!r} is less than one byte. Write a size such as 5GB.")
    return size


def parse_duration(text: str) -> float:
    """Seconds of `2h`, `90min`, `1.5 h` or `3600s`, 0 of an empty text; raises InputError for
    anything else."""
    if not text:
        return 0.0
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*(s|min|h)\s*", text, re.ASCII)
    if match is None or not float(match[1]):
        raise InputError(
            f"{text[:60]!r} is not a duration. Write a number and a unit, such as 2h, 90min or "
            "3600s."
        )
    return float(match[1]) * SECONDS[match[2]]
