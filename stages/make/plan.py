"""What make has to run: prints `stale-STAGE` for each stage that is stale; ends with status 2 after saying what is wrong.

    python3 -I -S stages/make/plan.py RUN_FOLDER STAGE:INPUTS:AFTER ... --given "NAMES" --goals "GOALS" [--show | --dry-run | --answer]

make runs it while it reads the Makefile, with the settings in the environment, for every goal that needs the graph,
`make -n` and `make -q` too: so it writes nothing, and takes the standard library alone (`-I -S`, no site-packages).
INPUTS (whose content counts) and AFTER (which only has to be there) are stages, separated by commas.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stages.model.fit import division_problems, length_problems
from stages.run.errors import InputError
from stages.run.layout import CONFIG_FILE
from stages.run.provenance import manifest_of, reasons
from stages.run.settings import Settings, unknown_names

MAKE_VARIABLES = ("RECIPE", "RUN", "PYTHON", "VENV", "YES", "NEURON_PIP_INDEX", "IMAGE", "DOCKER")
MOST_RUN_CHARACTERS = 200  # of a folder's name; 255 bytes is the file systems' bound


def stale_stages(
    graph: dict[str, list[str]], run_folder: Path, settings: Settings
) -> dict[str, list[str]]:
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


def model_problems(settings: Settings) -> list[str]:
    """What of the settings contradicts config.json of a local MODEL_ID. One that cannot be read is left to the stage that reads it."""
    try:
        config = SimpleNamespace(**json.loads((Path(settings.model_id) / CONFIG_FILE).read_bytes()))
        return [*division_problems(settings, config), *length_problems(settings, config)]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return []


def refuse(problems: list[str]) -> None:
    """End with all of the problems, if there are any."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)


def main(run_folder: str, *words: str) -> None:
    options = words.index("--given")
    given, goals, flags = (
        words[options + 1].split(),
        words[options + 3].split(),
        words[options + 4 :],
    )
    graph, after = {}, {}
    for word in words[:options]:
        stage, inputs, behind = word.split(":")
        graph[stage] = [name for name in inputs.split(",") if name]
        after[stage] = [name for name in behind.split(",") if name]
    problems = unknown_names(given, also=MAKE_VARIABLES)
    # make takes `LEARNING RATE=1` for a target, which it would miss only once the others are made.
    problems += [
        f"{goal[:60]!r} is not a setting: its name may hold no spaces."
        for goal in goals
        if "=" in goal
    ]
    if len(Path(run_folder).name) > MOST_RUN_CHARACTERS:
        problems.append(
            f"RUN has {len(Path(run_folder).name):,} characters. Choose a name of at most {MOST_RUN_CHARACTERS}."
        )
    try:
        settings = Settings.read()
    except InputError as error:
        problems += error.problems
    refuse(problems)
    try:
        stale = stale_stages(graph, Path(run_folder), settings)
    except OSError as error:
        refuse([f"{error.filename} cannot be read: {error.strerror}."])
    if "--answer" not in flags and {"precompile", "train"} & stale.keys() & needed(
        goals, graph, after
    ):
        refuse(model_problems(settings))
    if "--show" in flags:
        for stage in graph:
            print(
                f"{stage:>18}  {'to run: ' + '; '.join(stale[stage]) if stage in stale else 'up to date'}"
            )
        return
    if "--answer" in flags:
        for stage in [
            stage for stage in stale if stage != "eval" and not stale[stage][0].startswith("unless")
        ]:
            print(
                f"note: answered by the model that is there; {stage} would run again: {'; '.join(stale[stage])}",
                file=sys.stderr,
            )
    if "--dry-run" in flags:
        for stage in [stage for stage in stale if stage in needed(goals, graph, after)]:
            print(f"# {stage}: {'; '.join(stale[stage])}", file=sys.stderr)
    print(" ".join(f"stale-{stage}" for stage in stale))


if __name__ == "__main__":
    main(*sys.argv[1:])
