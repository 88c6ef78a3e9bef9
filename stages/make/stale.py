"""Which stages make has to run: prints `stale-STAGE` for each, or exits with 2 and the problems.

    python3 -I -S stages/make/stale.py RUN_FOLDER STAGE:INPUTS:AFTER ... --given NAMES --goals GOALS
        [--show | --why | --adopt | --dry-run | --answer | --check-run]

make starts this while it reads the Makefile, with the settings in the environment, for every goal
that needs the graph, also under `make -n` and `make -q`. So it writes nothing and needs only the
standard library (`-I -S`: no site-packages). INPUTS (stages whose content counts) and AFTER (stages
that only have to exist) are separated by commas. --show prints the stages and the other runs
instead, --why the reasons of STAGE; --adopt takes STAGE as it is, and is the one that writes.
--dry-run and --answer add notes for `make -n` and `make eval PROMPT=...`, --check-run only checks
RUN and RECIPE.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # before the imports: make waits for this process, which ends before it pays

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stages.model.location import own_output_problems
from stages.run.errors import InputError
from stages.run.layout import SHARDS_FOLDER
from stages.run.manifest import manifest_of
from stages.run.one_look import one_look
from stages.run.provenance import reasons
from stages.run.push_target import reason_to_push
from stages.run.settings import Settings, recipe_note, unknown_names, with_recipe

MAKE_VARIABLES = (
    *("RECIPE", "RUN", "STAGE", "RUNS", "PYTHON", "VENV", "YES", "TORTURE_SEED"),
    *("NEURON_PIP_INDEX", "IMAGE", "DOCKER", "BASE_IMAGE", "REQUIREMENTS", "PIP_EXTRA_INDEX_URL"),
)
# RUN is part of targets and shell lines, and a folder's name: file systems allow 255 bytes.
_RUN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", re.ASCII)
Graph = dict[str, list[str]]
# What a goal does with the model that exists; the others answer.
_DOES = {
    "push": "is pushed",
    "serve": "is served",
    "serve-check": "is compared",
    "benchmark": "is timed",
}


def stale_stages(graph: Graph, run_folder: Path, settings: Settings) -> dict[str, list[str]]:
    """Stage -> reasons, in the graph's order, for each stage that has to run.

    A stage after a stale one is listed too, since its input is not known yet. It checks again when
    its turn comes, and does nothing if its upstream published the same content.
    """
    stale: dict[str, list[str]] = {}
    for stage, inputs in graph.items():
        folders = {name: run_folder / name for name in inputs}
        stage_reasons = reasons(stage, settings, folders, run_folder / stage)
        stage_reasons = stage_reasons or [
            f"unless {name} publishes the same content" for name in inputs if name in stale
        ]
        if stage_reasons:
            stale[stage] = stage_reasons
    for stage in reversed(list(stale)):
        for name in graph[stage]:
            removed = (manifest_of(run_folder / name) or {}).get("removed")
            if removed and name not in stale:
                stale[name] = [f"{removed}, which {stage} needs"]
    if not settings.keep_shards and (run_folder / "train" / SHARDS_FOLDER).is_dir():
        stale.setdefault("consolidate", ["KEEP_SHARDS=0, and train's shards are still there"])
    if settings.gates:
        stale.setdefault("eval", ["GATES are to be checked"])  # it publishes nothing
    if push := reason_to_push(settings.push_dataset, run_folder / "data"):
        stale.setdefault("data", [push])  # it publishes nothing
    return {stage: stale[stage] for stage in graph if stage in stale}


def needed(goals: list[str], graph: Graph, after: Graph) -> set[str]:
    """The goals that are stages (all stages where none is), and every stage before them."""
    pending = [goal for goal in goals if goal in graph] or list(graph)
    stages: set[str] = set()
    while pending:
        stage = pending.pop()
        stages.add(stage)
        pending += [name for name in graph[stage] + after[stage] if name not in stages]
    return stages


def foreseen(settings: Settings, stages: set[str]) -> list[str]:
    """Why one of the stages that have to run would refuse, as far as that is known now."""
    if not stages:
        return []
    from stages.checks import local_config, machine_problems, problems  # a no-op needs none of it

    try:
        config = local_config(settings.model_id)
    except InputError as error:
        return error.problems
    return [*problems(settings, config, stages), *machine_problems(settings, stages)]


def run_problems(run: str) -> list[str]:
    """Why RUN cannot be the name of a folder in outputs/."""
    if _RUN.fullmatch(run):
        return []
    if len(run) > 200:
        return [f"RUN has {len(run):,} characters. Choose a name of at most 200."]
    return [
        f"RUN={run!r} must be the name of a folder in outputs/: letters, digits, dots, - and _, "
        "without a leading dot or dash."
    ]


def refuse(problems: list[str]) -> None:
    """End with all of the problems, if there are any."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)


def print_notes(stale: dict[str, list[str]], stages: list[str], text: str) -> None:
    """A line on stderr for each of `stages` that is stale."""
    for stage in stages:
        if stage in stale:
            print(text.format(stage=stage, reasons="; ".join(stale[stage])), file=sys.stderr)


def print_outdated(stale: dict[str, list[str]], graph: Graph, goals: list[str]) -> None:
    """A line on stderr for each stale stage that the existing model, which goals use, is made
    of."""
    made_of = needed(goals, graph, {stage: [] for stage in graph})
    outdated = [
        stage
        for stage in stale
        if stage in made_of
        and (stage != "eval" or "serve-check" in goals)
        and not stale[stage][0].startswith("unless")
    ]
    does = next((text for goal, text in _DOES.items() if goal in goals), "answers")
    note = f"note: the existing model {does}; {{stage}} would run again: {{reasons}}"
    print_notes(stale, outdated, note)


def parse_graph(words: list[str]) -> tuple[Graph, Graph]:
    """Stage -> inputs, and stage -> stages that only have to exist before it."""
    parts = [word.split(":") for word in words]
    graph = {stage: [name for name in inputs.split(",") if name] for stage, inputs, _ in parts}
    after = {stage: [name for name in before.split(",") if name] for stage, _, before in parts}
    return graph, after


def typed_problems(given: list[str], goals: list[str]) -> list[str]:
    """What is wrong with the variables and goals of the command line."""
    unknown = unknown_names(given, also=MAKE_VARIABLES)
    if os.environ.get("MAKELEVEL", "0") != "0":  # an outer make passes its own variables on, as V=1
        for problem in unknown:
            print(f"note: from the outer make: {problem}", file=sys.stderr)
        unknown = []
    if "CONTEXT" in given and "PROMPT" not in given:
        unknown.append(
            "CONTEXT without PROMPT: there is no instruction that it belongs to. Set PROMPT."
        )
    # make takes `LEARNING RATE=1` for a goal, and would only miss it after making the others.
    return unknown + [
        f"{goal[:60]!r} is not a setting: its name must not contain spaces."
        for goal in goals
        if "=" in goal
    ]


def stage_asked(graph: Graph) -> str:
    """STAGE, for `make why` and `make adopt`; ends with 2 where it names none."""
    stage = os.environ.get("STAGE", "")
    if stage not in graph:
        refuse([f"STAGE={stage!r} is no stage. Set it to one of {', '.join(graph)}."])
    return stage


def adopt_stage(stage: str, settings: Settings, graph: Graph, run_folder: Path) -> None:
    from stages.make.adopt import adopt

    try:
        reasons = adopt(stage, settings, graph[stage], run_folder)
    except InputError as error:
        refuse(error.problems)
    except OSError as error:
        refuse([f"{error.filename} cannot be written: {error.strerror}. Nothing was adopted."])
    print(f"{stage}: adopted in spite of: {'; '.join(reasons)}")


def main(run_folder: str, *words: str) -> None:
    options = words.index("--given")
    given, goals = words[options + 1].split(), words[options + 3].split()
    flags = words[options + 4 :]
    graph, after = parse_graph(list(words[:options]))
    found = run_problems(os.environ.get("RUN", Path(run_folder).name))
    if "--check-run" in flags:
        try:
            with_recipe(os.environ)
        except InputError as error:
            found += error.problems
        refuse(found)
        return
    found += typed_problems(given, goals)
    try:
        settings = Settings.read()
    except InputError as error:
        refuse(found + error.problems)
    if "push" in goals and not settings.hub_repo:
        found.append("HUB_REPO is not set. Name the repository that make push fills, OWNER/NAME.")
    if "--answer" not in flags:  # an answer needs no base model
        found += own_output_problems(settings.model_id, Path(run_folder))
    refuse(found)
    try:
        with one_look():
            stale = stale_stages(graph, Path(run_folder), settings)
    except OSError as error:
        refuse([f"{error.filename} cannot be read: {error.strerror}."])
    if "--adopt" in flags:
        adopt_stage(stage_asked(graph), settings, graph, Path(run_folder))
        return
    if "--why" in flags:
        from stages.make.status import print_why

        print_why(stage_asked(graph), stale, graph, Path(run_folder))
        return
    to_run = stale.keys() & needed(goals, graph, after)
    if "--answer" in flags:
        print_outdated(stale, graph, goals)
    else:
        found = foreseen(settings, to_run)
        if to_run and (line := recipe_note(os.environ)):
            print(f"note: {line}", file=sys.stderr)
        if "--show" in flags:
            from stages.make.status import print_status

            print_status(stale, graph, found, Path(run_folder))
            return
        refuse(found)
    if "--dry-run" in flags:
        print_notes(stale, [stage for stage in graph if stage in to_run], "# {stage}: {reasons}")
    print(" ".join(f"stale-{stage}" for stage in stale))


if __name__ == "__main__":
    main(*sys.argv[1:])
