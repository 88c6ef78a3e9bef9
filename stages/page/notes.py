"""What to watch in a run: each finding with its number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from stages.make.results import of_other_inputs
from stages.page.facts import Facts
from stages.text.data_notes import data_notes

RISE = 0.01  # of the validation loss over its lowest: less is noise


class Note(NamedTuple):
    """`figure` measures what `text` says."""

    figure: str
    text: str


def notes_of(facts: Facts) -> list[Note]:
    return [
        *_over_fitting(facts.steps),
        *_no_better(facts.metrics("eval")),
        *_of_data(facts.metrics("data"), facts.settings("data")),
        *_leaky_packing(facts),
        *_of_another_run(facts),
        *_adopted(facts),
    ]


def _over_fitting(steps: list[dict[str, Any]]) -> Iterator[Note]:
    measured = [one for one in steps if isinstance(one.get("validation_loss"), float)]
    if len(measured) < 2:
        return
    lowest, last = min(measured, key=lambda one: one["validation_loss"]), measured[-1]
    rise = last["validation_loss"] / lowest["validation_loss"] - 1
    if rise > RISE:
        yield Note(
            f"+{rise:.1%}",
            f"Over-fitting: the validation loss was lowest at step {lowest['step']:,} "
            f"({lowest['validation_loss']:.4f}) and ended at {last['validation_loss']:.4f}. Train "
            "fewer epochs, or with a lower LEARNING_RATE.",
        )


def _no_better(measured: dict[str, Any]) -> Iterator[Note]:
    base, tuned = (measured.get(name, {}).get("loss") for name in ("base", "fine_tuned"))
    if base and tuned and tuned >= base:
        yield Note(
            f"+{tuned - base:.3f}",
            f"The fine-tuned model's loss on held-out sequences ({tuned:.4f}) is not below the "
            f"base model's ({base:.4f}).",
        )
    asked = measured.get("comparison", {})
    ended = asked.get("fine_tuned", {}).get("ended", 0)
    if (count := asked.get("questions", 0)) > ended:
        yield Note(
            f"{count - ended} of {count}",
            "Answers of the fine-tuned model do not end within MAX_NEW_TOKENS.",
        )


def _of_data(made: dict[str, Any], settings: dict[str, Any]) -> Iterator[Note]:
    """What was cut, left out or repeated."""
    tokens, limit = made.get("tokens_in", 0), f"{made.get('max_length', 0):,}"
    if settings.get("PACKING") == "concat":
        yield Note(
            f"{made.get('over_long', 0):,}",
            f"Documents longer than {limit} tokens. PACKING=concat cuts these, and whatever "
            "crosses the end of a sequence; how many that are was not counted.",
        )
    if cut := made.get("cut_tokens"):
        documents = made["over_long"] - made["dropped"]
        yield Note(
            _share(cut, tokens),
            f"Truncation: {cut:,} tokens were cut off {documents:,} documents longer than "
            f"{limit}, with the end of the answer. Raise MAX_LENGTH, or set OVERLONG=drop.",
        )
    if lost := made.get("dropped_tokens"):
        yield Note(
            _share(lost, tokens),
            f"{made['dropped']:,} documents, {lost:,} tokens, were left out: longer than "
            f"MAX_LENGTH={limit}, with OVERLONG=drop or no answer in what would remain.",
        )
    if empty := made.get("empty"):
        yield Note(f"{empty:,}", "Examples without an instruction or a response were left out.")
    if same := made.get("duplicate"):
        yield Note(f"{same:,}", "Documents have the text of an earlier one, and were kept.")
    for figure, text in data_notes(made):
        yield Note(figure, text[0].upper() + text[1:])


def _share(count: int, tokens: int) -> str:
    """Of all tokens, which a manifest may lack."""
    return f"{count / tokens:.1%}" if tokens else f"{count:,}"


def _leaky_packing(facts: Facts) -> Iterator[Note]:
    train = facts.metrics("data").get("train", {})
    sequences, documents = train.get("rows", 0), train.get("documents", 0)
    if facts.settings("train").get("BACKEND") == "neuron" and documents > sequences > 0:
        yield Note(
            f"{documents / sequences:.1f}",
            "Leaky packing: documents share a sequence and attend to each other, because "
            "optimum-neuron's attention has no mask but the causal one. The number is their mean.",
        )


def _of_another_run(facts: Facts) -> Iterator[Note]:
    for stage, source, content, now in of_other_inputs(facts.manifests):
        yield Note(
            content[:8],
            f"{stage} was made from another output of {source} than the one shown here "
            f"({now[:8]}). make {stage} makes it again.",
        )
    if facts.unfinished:
        others = "; all other figures are of the training before" * ("train" in facts.manifests)
        last = facts.steps[-1]["step"] if facts.steps else 0
        yield Note(f"step {last:,}", f"The curves are of a training that has not finished{others}.")


def _adopted(facts: Facts) -> Iterator[Note]:
    for stage, made in facts.manifests.items():
        for one in made.get("adopted", []):
            yield Note(
                str(one.get("at", ""))[:10],
                f"{stage} was adopted in spite of {'; '.join(map(str, one['in_spite_of']))}. Its "
                "settings below are those that it was made with.",
            )
