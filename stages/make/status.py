"""What `make status` and `make why` print. Standard library only, and nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from stages.make.results import facts, finished, of_other_inputs, outcome, published, runs_of
from stages.run.manifest import manifest_of
from stages.run.progress import duration

Graph = dict[str, list[str]]


def print_status(
    stale: dict[str, list[str]], graph: Graph, found: list[str], run_folder: Path
) -> None:
    """Each stage of this run with its result, why a stage would refuse, and a line for every other
    run."""
    for stage in graph:
        state = f"to run: {'; '.join(stale[stage])}" if stage in stale else "up to date"
        print(f"{stage:>18}  {state}")
        manifest = manifest_of(run_folder / stage)
        if manifest is not None:
            print(f"{'':>18}  {facts(manifest)}")
        if stage == "data" and (read := _what_data_read(manifest)):
            print(f"{'':>18}  {read}")
    for problem in found:
        print(f"would be refused: {problem}", file=sys.stderr)
    others = [run for run in runs_of(run_folder.parent, graph) if run != run_folder]
    if others:
        print("\nother runs (RUN=NAME):")
    width = max((len(run.name) for run in others), default=0)
    for run in others:
        print(f"  {run.name:<{width}}  {_of_run(run, graph)}")


def print_why(stage: str, stale: dict[str, list[str]], graph: Graph, run_folder: Path) -> None:
    """Every reason for which `stage` would run, what that took last time, and what follows it."""
    manifest = manifest_of(run_folder / stage)
    if stage not in stale:
        print(f"{stage}: up to date: {facts(manifest or {})}")
        return
    print(f"{stage} would run:")
    for reason in stale[stage]:
        print(f"  {reason}")
    after = [name for name in stale if stage in _before(name, graph)]
    if after:
        print(f"after it, unless it publishes the same content: {', '.join(after)}")
    if manifest is not None:
        print(f"what is published stays until then: {facts(manifest)}")


def _before(stage: str, graph: Graph) -> set[str]:
    """Every stage that `stage` is made from, directly or not."""
    return {name for one in graph[stage] for name in (one, *_before(one, graph))}


def _of_run(run: Path, graph: Graph) -> str:
    """A run in a line, from its manifests alone: its settings are not known here."""
    manifests = published(run, graph)
    if not manifests:
        return "no manifest that can be read"
    last = max(manifests.values(), key=finished)
    seconds = sum(one.get("seconds") or 0.0 for one in manifests.values())
    others = [stage for stage, *_ in of_other_inputs(manifests)]
    usd = [one["usd"] for one in manifests.values() if isinstance(one.get("usd"), int | float)]
    parts = [
        f"{len(manifests)} of {len(graph)} stages",
        finished(last),
        duration(seconds),
        f"{sum(usd):.2f} USD" if usd else "",
        outcome(manifests.get("eval") or manifests.get("train") or last),
        *(f"{stage} is of other inputs" for stage in dict.fromkeys(others)),
    ]
    return ", ".join(part for part in parts if part)


def _what_data_read(manifest: dict[str, Any] | None) -> str:
    """The columns and the prompt's format that the published data were made with, as a line."""
    metrics = (manifest or {}).get("metrics")
    if not isinstance(metrics, dict) or not metrics.get("columns"):
        return ""
    return f"read: {metrics['columns']}; prompts: {metrics.get('prompt_format')}"
