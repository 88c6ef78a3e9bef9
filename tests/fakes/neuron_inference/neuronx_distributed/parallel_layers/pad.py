"""Arithmetic of padded heads."""

from __future__ import annotations


def get_number_of_extra_heads(heads: int, parts: int) -> int:
    return -heads % parts
