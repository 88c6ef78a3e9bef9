"""Render what is known of a run as one HTML file that asks nothing of the network.

Every text of a dataset, a model or a path is escaped: by Jinja2 for HTML, and before by
`printable` for characters that change the direction of what follows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from stages.page.facts import ANSWERS_SHOWN, STAGES, Facts
from stages.page.notes import notes_of
from stages.page.plots import MOST_POINTS, curves, histogram
from stages.run.progress import duration, printable, show_size

# A plot's title -> its metrics, and the id of each one's curve.
PLOTS = {
    "Loss, nats per token": {"loss": "loss-training", "validation_loss": "loss-validation"},
    "Learning rate": {"learning_rate": "learning-rate"},
    "Gradient norm": {"grad_norm": "gradient-norm"},
    "Tokens per second": {"tokens_per_second": "throughput"},
}
MOST_CHARACTERS = 700  # of one text on the page


def render(facts: Facts, nonce: str = "") -> str:
    """The page. `nonce`: of the script that updates it, for a page that is served."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(text=_text, number=_number, time=_time)
    data = facts.metrics("data")
    plots = {title: curves(facts.steps, names, title) for title, names in PLOTS.items()}
    return environment.get_template("page.html.j2").render(
        facts=facts,
        nonce=nonce,
        stages=STAGES,
        notes=notes_of(facts),
        plots=[(title, Markup(svg)) for title, svg in plots.items() if svg],
        lengths=_histogram(data),
        data=data,
        evaluated=facts.metrics("eval"),
        size=_size(facts),
        planned=[*_planned(facts)],
        record=_record(facts),
        seconds=sum(made.get("seconds") or 0.0 for made in facts.manifests.values()),
        dollars=_dollars(facts),
        most_points=MOST_POINTS,
        most_answers=ANSWERS_SHOWN,
    )


def _text(value: object, most: int = MOST_CHARACTERS) -> str:
    text = printable(str(value))
    more = len(text) - most
    return f"{text[:most]} … and {more:,} more characters" if more > 0 else text


def _number(value: Any, digits: int = 0) -> str:
    if not isinstance(value, int | float):
        return "not measured"
    return f"{value:,.{digits}f}" if math.isfinite(value) else "infinite"


def _time(value: Any) -> str:
    return duration(value) if isinstance(value, int | float) else "not measured"


def _histogram(data: dict[str, Any]) -> Markup:
    lengths = data.get("lengths")
    drawn = lengths and histogram(lengths["edges"], lengths["counts"], data["max_length"])
    return Markup(drawn or "")


def _size(facts: Facts) -> str:
    """What was trained of the model, in words; "" where that is not known yet."""
    parameters = facts.metrics("consolidate").get("parameters")
    made = facts.settings("train")
    if not made:
        return ""
    count = f"{parameters / 1e6:,.1f} million parameters" if parameters else "its parameters"
    if made.get("LORA_R"):
        return f"LoRA of rank {made['LORA_R']} on {count}"
    random = ", from random weights" if made.get("INIT_WEIGHTS") == "random" else ""
    return f"All {count}{random}"


def _planned(facts: Facts) -> Iterator[tuple[str, str, str, str, str]]:
    """Stage, what, planned, measured, deviation: of the manifests' forecasts."""
    forms = {"seconds": ("time", duration), "peak_memory_bytes": ("peak memory", show_size)}
    for stage, made in facts.manifests.items():
        for name, (what, form) in forms.items():
            pair = (made.get("forecast") or {}).get(name) or {}
            planned, measured = pair.get("planned"), pair.get("measured")
            if planned is None and measured is None:
                continue
            yield (
                stage,
                what,
                "unknown" if planned is None else form(planned),
                "not measured" if measured is None else form(measured),
                f"{measured / planned - 1:+.1%}" if planned and measured is not None else "",
            )


def _dollars(facts: Facts) -> str:
    """What the stages cost together, as far as their price was known."""
    paid = [usd for made in facts.manifests.values() if (usd := made.get("usd")) is not None]
    if not paid:
        return ""
    unknown = len(facts.manifests) - len(paid)
    return f"{sum(paid):,.2f} USD" + (f", and {unknown} stages of unknown price" * bool(unknown))


def _record(facts: Facts) -> dict[str, list[tuple[str, str, str]]]:
    """Title -> its table's rows: name, value, stages."""
    made = facts.manifests
    return {
        # precompile's are train's.
        "Settings": _grouped({name: facts.settings(name) for name in made if name != "precompile"}),
        "Versions": _grouped({name: one.get("versions") or {} for name, one in made.items()}),
        "Digests of the outputs (SHA-256)": [
            (name, one["content"], "") for name, one in made.items()
        ],
    }


def _grouped(tables: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Name, value, stages: stages with the same value share a row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for stage, values in tables.items():
        for name, value in values.items():
            rows.setdefault((name, str(value)), []).append(stage)
    everywhere = {stage for stages in rows.values() for stage in stages}
    return [
        (name, value, "all" if len(stages) == len(everywhere) else ", ".join(stages))
        for (name, value), stages in sorted(rows.items())
    ]
