"""What repeats and what looks like a secret or an address in the data, in words. Standard library
only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def data_notes(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What repeats and what looks like a secret or an address in the data, by `Accounting.figures`:
    a number, and the rest of the sentence that begins with it."""
    r = figures.get("repeated", {})
    for counted, whole, text in (
        ("near", "compared", "different documents nearly equal an earlier one, and were kept."),
        (
            "near_training",
            "held_out",
            "held-out documents nearly equal one that is trained on: their loss says little.",
        ),
        (
            "asked_in_training",
            "held_out",
            "held-out documents ask what a document asks that is trained on.",
        ),
        ("prompts_in_training", "prompts", "questions in PROMPTS are trained on."),
    ):
        if r.get(counted):
            yield f"{r[counted]:,} of {r[whole]:,}", text
    if count := r.get("not_compared"):
        yield f"{count:,}", "documents after the first were not compared with others."
    if found := figures.get("sensitive"):
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(found.items()))
        yield f"{sum(found.values()):,}", f"finds that may be secrets or addresses: {kinds}."
