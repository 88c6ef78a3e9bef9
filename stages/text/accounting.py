"""Account for every example and every token, for the manifest and for the screen."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from stages.run.errors import StageFailure
from stages.text.conversation import Conversation


@dataclass
class SplitAccount:
    """One split. `documents_tokens` = `packed` + `left_over`; `rows` (the sequences) x `max_length`
    = `packed` + `padded`."""

    documents: int = 0
    documents_tokens: int = 0
    left_over: int = 0  # tokens of concat's last, incomplete sequence
    rows: int = 0  # sequences
    packed: int = 0
    padded: int = 0
    supervised: int = 0  # labels that are not -100


@dataclass
class Accounting:
    """Counts of one dataset, from the examples read to the sequences written."""

    max_length: int
    rows_in: int = 0  # examples
    empty: int = 0  # examples without an instruction or a response; left out
    duplicate: int = 0  # documents with the text of an earlier one; kept
    # Documents in which a token would have spanned the prompt and the response.
    split_again: int = 0
    per_answer: int = 0  # documents beyond one per example: answers that have one of their own
    unanswered: int = 0  # messages after the last answer; left out
    tokens_in: int = 0
    roles: dict[str, int] = field(default_factory=dict)  # tokens in, by the role of their message
    over_long: int = 0  # documents longer than max_length
    dropped: int = 0  # over-long documents that were left out
    cut_tokens: int = 0  # tokens cut off over-long documents
    dropped_tokens: int = 0  # tokens of dropped documents
    train: SplitAccount = field(default_factory=SplitAccount)
    validation: SplitAccount = field(default_factory=SplitAccount)
    # Documents by their length before any is cut: bin edges in tokens, and counts.
    lengths: dict[str, list[int]] = field(default_factory=dict)
    # What repeats.Repeated counts, and how many examples have a text of a kind of sensitive.KINDS.
    repeated: dict[str, int] = field(default_factory=dict)
    sensitive: dict[str, int] = field(default_factory=dict)
    # Not counts: one document's text, chosen by the seed, and some of the held-out conversations.
    sample: str = ""
    held_out: list[Conversation] = field(default_factory=list)

    @property
    def splits(self) -> dict[str, SplitAccount]:
        return {"train": self.train, "validation": self.validation}

    @property
    def fill(self) -> float:
        """The fraction of the written tokens that is text rather than padding, 0 to 1."""
        total = self.max_length * sum(split.rows for split in self.splits.values())
        return sum(split.packed for split in self.splits.values()) / total if total else 0.0

    def figures(self) -> dict[str, Any]:
        """The counts for a manifest."""
        figures = asdict(self)
        del figures["sample"], figures["held_out"]
        return {**figures, "fill": round(self.fill, 6)}

    def check(self) -> None:
        """Raise StageFailure unless every example and every token is accounted for."""
        splits = self.splits.values()
        sums = {
            "examples in": (
                self.rows_in + self.per_answer,
                self.empty + self.dropped + sum(split.documents for split in splits),
            ),
            "tokens in": (
                self.tokens_in,
                self.cut_tokens
                + self.dropped_tokens
                + sum(split.documents_tokens for split in splits),
            ),
        }
        if self.roles:
            sums["tokens by role"] = (self.tokens_in, sum(self.roles.values()))
        for name, split in self.splits.items():
            sums[f"{name}'s tokens"] = (split.documents_tokens, split.packed + split.left_over)
            sums[f"{name}'s sequence tokens"] = (
                split.rows * self.max_length,
                split.packed + split.padded,
            )
            if split.supervised > split.packed:
                sums[f"{name}'s supervised tokens"] = (split.supervised, split.packed)
        problems = [
            f"{name}: {total:,} but their parts add up to {parts:,}"
            for name, (total, parts) in sums.items()
            if total != parts
        ]
        if problems:
            raise StageFailure(
                "The accounts do not balance, so tokens were lost or counted twice. "
                + "; ".join(problems)
                + "."
            )

    def table(self) -> str:
        """The accounts as a table."""
        train, validation = self.train, self.validation
        lines = [
            ("examples in", self.rows_in, ""),
            ("  empty", self.empty, "left out"),
            ("  dropped", self.dropped, f"left out: longer than {self.max_length:,} tokens"),
            ("  documents for training", train.documents, ""),
            ("  documents for validation", validation.documents, ""),
            ("  among them over-long", self.over_long - self.dropped, "cut"),
            ("  among them duplicate", self.duplicate, "kept, in the split of the first"),
            (
                "  among them split again",
                self.split_again,
                "a token would span prompt and response",
            ),
            *[("  among them one per answer", self.per_answer, "more than examples")]
            * bool(self.per_answer),
            *[("messages after the last answer", self.unanswered, "left out")]
            * bool(self.unanswered),
            ("tokens in", self.tokens_in, ""),
            *((f"  of {role}", count, "") for role, count in self.roles.items() if count),
            ("  cut off over-long documents", self.cut_tokens, ""),
            ("  of dropped documents", self.dropped_tokens, ""),
            ("  left over after last sequence", train.left_over + validation.left_over, ""),
            ("  packed for training", train.packed, f"{train.supervised:,} supervised"),
            ("  packed for validation", validation.packed, f"{validation.supervised:,} supervised"),
            (
                "sequences out",
                train.rows + validation.rows,
                f"of {self.max_length:,} tokens, {self.fill:.2%} full",
            ),
            ("  training", train.rows, f"{train.padded:,} tokens of padding"),
            ("  validation", validation.rows, f"{validation.padded:,} tokens of padding"),
        ]
        return "\n".join(f"{name:<32}{count:>16,}  {note}".rstrip() for name, count, note in lines)
