"""The page's curves, drawn by matplotlib as SVG that takes its colours from the page.

A curve's group has an id (`loss-training`), and one vertex for each logged step.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Steps = list[dict[str, Any]]
FONT_CACHE = Path("outputs/.cache/matplotlib")
MOST_POINTS = 1000  # of a curve; of more steps every second, third, ... is drawn
_INCHES = (4.6, 2.5)  # an SVG's point is 4/3 of the page's pixel: 442 x 240 pixels
# Colours that nothing else in the SVG has, and the variables of the page that take their place.
_INK, _LINE, _FIRST, _SECOND = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {_INK: "--muted", _LINE: "--line", _FIRST: "--first", _SECOND: "--second"}
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "trn-tune",
    "path.simplify": False,
    "font.family": "sans-serif",
    "font.size": 9,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INK
    ),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _LINE),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
}


def curves(steps: Steps, names: dict[str, str], title: str) -> str:
    """A plot over the steps: `names` are the metric of each curve -> its id. "" for no point."""
    drawn = {id: points for metric, id in names.items() if (points := _points(steps, metric))}
    if not drawn:
        return ""

    def draw(axes: Axes) -> None:
        for (id, points), colour in zip(drawn.items(), (_FIRST, _SECOND), strict=False):
            few = len(points) <= 40
            axes.plot(
                *zip(*points, strict=True), color=colour, gid=id, lw=1.6, marker="o" * few, ms=3
            )
        axes.set_xlabel("step")
        axes.locator_params(axis="x", integer=True, nbins=6, steps=[1, 2, 5, 10])
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        axes.margins(x=0.02)

    return _svg(draw, f"{title} by step")


def histogram(edges: list[float], counts: list[int], limit: int) -> str:
    """How many documents have how many tokens; a line at MAX_LENGTH (`limit`)."""

    def draw(axes: Axes) -> None:
        axes.stairs(counts, edges, fill=True, color=_FIRST, gid="lengths")
        if edges[0] <= limit <= edges[-1]:
            axes.axvline(limit, color=_SECOND, lw=1.4, gid="max-length")
        axes.set_xlabel("tokens of a document")
        axes.margins(x=0)

    return _svg(draw, "documents by their length in tokens")


def _points(steps: Steps, metric: str) -> list[tuple[int, float]]:
    """The steps that logged a finite `metric`: at most MOST_POINTS, the last among them."""
    points = [
        (one["step"], one[metric])
        for one in steps
        if isinstance(one.get(metric), int | float) and isfinite(one[metric])
    ]
    every = -(-len(points) // MOST_POINTS) or 1
    return points[::-1][::every][::-1]


def _svg(draw: Callable[[Axes], None], label: str) -> str:
    # A home may not be writable, as in a container, and a user's matplotlibrc is for other plots.
    os.environ.setdefault("MPLCONFIGDIR", str(FONT_CACHE))
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_INCHES, layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Several plots are in one page, and an id may be there once.
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)
    mark = re.sub(r"\W+", "-", label)
    svg = re.sub(r'(id="|url\(#|href="#)([mp][0-9a-f]{10})', rf"\1{mark}-\2", svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var({name})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
