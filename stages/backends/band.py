"""Whether a training's first steps are those of a reference, as far as rounding allows.

The reference was computed in float32 by one process on a CPU, and again in bfloat16. What bfloat16
changes there, times FACTOR, is the band in which another device, layout or backend may deviate: no
number is chosen by hand for a model or a quantity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from stages.backends.record import PROJECTIONS

FACTOR = 4.0
# Below these bfloat16 may have changed nothing by chance: the rounding of float32 sums, and of
# weights that are kept in bfloat16.
LEAST = {"loss": 1e-4, "grad_norm": 1e-3, "gradient": 1e-3, "weight": 1e-2}
EXACT = 1e-6  # relative: learning rates, and copies of a weight on several ranks
NAMED = 5  # tensors in the message


class Deviation(NamedTuple):
    """A quantity of a step that is out of its band; step 0 is before the first."""

    step: int
    quantity: str
    deviation: float
    allowed: float

    def __str__(self) -> str:
        when = f"step {self.step}" if self.step else "before the first step"
        return f"{when}: {self.quantity}: off by {self.deviation:.3g}, allowed {self.allowed:.3g}"


def read_record(path: Path) -> list[dict[str, Any]]:
    """The lines of record.jsonl; the first is what was before the first step."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def out_of_band(
    reference: list[dict[str, Any]], rounded: list[dict[str, Any]], run: list[dict[str, Any]]
) -> list[Deviation]:
    """Everything out of its band in the first step that has any; empty where nothing is.

    `reference` and `rounded` are the float32 and the bfloat16 records, `run` is compared.
    """
    noise = _noise(reference, rounded)
    whole = run[0].get("whole", True)
    for number, (expected, found) in enumerate(zip(reference, run, strict=False)):
        deviations = [
            Deviation(number, quantity, deviation, allowed)
            for quantity, deviation, allowed in _deviations(number, expected, found, noise, whole)
            if not deviation <= allowed  # NaN is out of every band
        ]
        if deviations:
            return sorted(deviations, key=lambda one: -_size(one.deviation / one.allowed))
    return []


def told(deviations: list[Deviation]) -> list[str]:
    """The deviations of a step as lines, the largest first."""
    shown = [str(one) for one in deviations[:NAMED]]
    more = len(deviations) - len(shown)
    return [*shown, f"and {more} more of step {deviations[0].step}"] if more > 0 else shown


def _deviations(
    number: int,
    expected: Mapping[str, Any],
    found: Mapping[str, Any],
    noise: Mapping[str, float],
    whole: bool,
) -> Iterator[tuple[str, float, float]]:
    """Quantity, relative deviation and what is allowed. What is not `whole` has some tensors only,
    which the reference may have under other names."""
    kind = "gradient" if number else "weight"
    known, seen = expected[f"{kind}s"], found[f"{kind}s"]
    if not whole:
        both = known.keys() & seen.keys()
        known, seen = ({name: one[name] for name in both} for one in (known, seen))
    yield from _of_tensors(kind, known, seen, noise)
    if number == 0:
        return
    for name in ("loss", "grad_norm"):
        yield name, _relative(found[name], expected[name]), FACTOR * noise[name]
    rate = _relative(found["learning_rate"], expected["learning_rate"])
    yield "learning_rate", rate, EXACT
    yield "the ranks' copies of a weight", found["apart"], EXACT


def published_out_of_band(
    step: int, expected: Mapping[str, list[float]], found: Mapping[str, list[float]]
) -> list[Deviation]:
    """The weights published after the last `step` that are not the reference's, as far as 16 bits
    tell."""
    return [
        Deviation(step, f"published: {quantity}", deviation, allowed)
        for quantity, deviation, allowed in _of_tensors("weight", expected, found, {})
        if not deviation <= allowed
    ]


def _of_tensors(
    kind: str,
    expected: Mapping[str, list[float]],
    found: Mapping[str, list[float]],
    noise: Mapping[str, float],
) -> Iterator[tuple[str, float, float]]:
    for name in sorted(expected.keys() ^ found.keys()):
        yield f"the {kind} of {name}, which only one of them has", math.inf, EXACT
    for name in expected.keys() & found.keys():
        allowed = FACTOR * noise.get(f"{kind} {name}", LEAST[kind])
        yield f"the {kind} of {name}", _distance(found[name], expected[name]), allowed


def _noise(reference: list[dict[str, Any]], rounded: list[dict[str, Any]]) -> dict[str, float]:
    """The deviation that bfloat16 makes of each quantity, the largest over the steps. A tensor that
    it happens to change little has the median of all."""
    noise = {
        name: max(
            LEAST[name],
            *(
                _relative(b[name], a[name])
                for a, b in zip(reference[1:], rounded[1:], strict=False)
            ),
        )
        for name in ("loss", "grad_norm")
    }
    of_tensors: dict[str, float] = {}
    for a, b in zip(reference[1:], rounded[1:], strict=False):
        for name, expected in a["gradients"].items():
            distance = _distance(b["gradients"][name], expected)
            of_tensors[name] = max(of_tensors.get(name, LEAST["gradient"]), distance)
    usual = median(of_tensors.values()) if of_tensors else 0.0
    return noise | {f"gradient {name}": max(one, usual) for name, one in of_tensors.items()}


def _distance(found: list[float], expected: list[float]) -> float:
    """How far apart two digests are, as a fraction of the expected tensor's norm."""
    size = max(abs(expected[0]), 1e-12)
    return (
        math.sqrt(
            sum((a - b) ** 2 for a, b in zip(found, expected, strict=True)) / (1 + PROJECTIONS)
        )
        / size
    )


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-12)


def _size(deviation: float) -> float:
    return math.inf if math.isnan(deviation) else deviation
