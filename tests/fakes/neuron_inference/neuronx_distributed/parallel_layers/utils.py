"""Arithmetic of shards."""

from __future__ import annotations


def divide(whole: int, parts: int) -> int:
    assert whole % parts == 0, f"{whole} is not divisible by {parts}"
    return whole // parts


def get_padding_length(size: int, multiple: int) -> int:
    return -size % multiple
