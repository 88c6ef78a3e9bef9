"""What make has to run: prints `stale-STAGE` for each stage that is stale, or `error` after saying what is wrong.

    python3 -I -S stages/run/plan.py RUN_FOLDER STAGE:INPUTS:AFTER ... --given "NAMES" --goals "GOALS" [--show | --dry-run | --answer]

make runs it while it reads the Makefile, with the settings in the environment, for every goal that needs the graph,
`make -n` and `make -q` too: so it writes nothing, and takes the standard library alone (`-I -S`, no site-packages).
INPUTS (whose content counts) and AFTER (which only has to be there) are stages, separated by commas.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stages.run.errors import InputError
from stages.run.record import manifest_of, reasons
from stages.run.settings import Settings, unknown_names

MAKE_VARIABLES = ("RECIPE", "RUN", "PYTHON", "VENV", "YES", "NEURON_PIP_INDEX", "IMAGE", "DOCKER")


def stale_stages(graph: dict[str, list[str]], run_folder: Path, settings: Settings) -> dict[str, list[str]]:
    """Stage -> reasons, in the graph's order, for each that has to run.

    A stage after a stale one is listed too, since what it will be given is not known yet; it looks again when its turn
    comes, and does nothing if its upstream was remade with the same content.
    """
    stale: dict[str, list[str]] = {}
    for stage, inputs in graph.items():
        folders = {name: run_folder / name for name in inputs}
        why = reasons(stage, settings, folders, run_folder / stage)
        why = why or [f"unless {name} comes out the same" for name in inputs if name in stale]
        if why:
            stale[stage] = why
    for stage in reversed(list(stale)):
        for name in graph[stage]:
            removed = (manifest_of(run_folder / name) or {}).get("removed")
            if removed and name not in stale:
                stale[name] = [f"{removed}, which {stage} needs"]
    return {stage: stale[stage] for stage in graph if stage in stale}


def needed(goals: list[str], graph: dict[str, list[str]], after: dict[str, list[str]]) -> set[str]:
    """The goals that are stages (all of them where none is), and every stage before them."""
    todo = [goal for goal in goals if goal in graph] or list(graph)
    found: set[str] = set()
    while todo:
        stage = todo.pop()
        found.add(stage)
        todo += [name for name in graph[stage] + after[stage] if name not in found]
    return found


def main(run_folder: str, *words: str) -> None:
    options = words.index("--given")
    given, goals, flags = words[options + 1].split(), words[options + 3].split(), words[options + 4 :]
    graph, after = {}, {}
    for word in words[:options]:
        stage, inputs, behind = word.split(":")
        graph[stage] = [name for name in inputs.split(",") if name]
        after[stage] = [name for name in behind.split(",") if name]
    problems = unknown_names(given, also=MAKE_VARIABLES)
    try:
        settings = Settings.read()
    except InputError as error:
        problems += error.problems
    if problems:
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        if "--show" in flags:
            sys.exit(2)
        print("error")
        return
    stale = stale_stages(graph, Path(run_folder), settings)
    if "--show" in flags:
        for stage in graph:
            print(f"{stage:>18}  {'to run: ' + '; '.join(stale[stage]) if stage in stale else 'up to date'}")
        return
    if "--answer" in flags:
        for stage in [stage for stage in stale if stage != "eval" and not stale[stage][0].startswith("unless")]:
            print(f"note: answered by the model that is there; {stage} would run again: {'; '.join(stale[stage])}", file=sys.stderr)
    if "--dry-run" in flags:
        for stage in [stage for stage in stale if stage in needed(goals, graph, after)]:
            print(f"# {stage}: {'; '.join(stale[stage])}", file=sys.stderr)
    print(" ".join(f"stale-{stage}" for stage in stale))


if __name__ == "__main__":
    main(*sys.argv[1:])
