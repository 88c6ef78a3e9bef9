"""Fills the Neuron compile cache with the graphs of the training.

neuron_parallel_compile runs the training command for a few steps, collects its graphs without
computing anything, and then compiles them in parallel. The key of the graphs is recorded, so that
train can say before it starts when it would have to compile again.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from stages.backends.neuron import cache
from stages.backends.neuron.arguments import environment, training_command
from stages.backends.neuron.compile_report import CompileReport, read_compile_report
from stages.backends.neuron.graph_key import graph_key
from stages.backends.neuron.hardware import device_name
from stages.backends.neuron.train import prepare
from stages.model.base import base_model_folder
from stages.run.errors import StageFailure
from stages.run.json_file import write_json
from stages.run.launch import launch
from stages.run.layout import PRECOMPILE_FILE
from stages.run.publish import StageResult
from stages.run.settings import Settings

# Where NeuronTrainer logs, it reduces the loss in a separate graph: the run must pass that step.
# How many steps lie between two logs shapes no graph, so it logs the first.
LOGGING_STEPS = 1
STEPS_PAST_LOGGING = 5


def precompile(settings: Settings, data: Path, work: Path) -> StageResult:
    """Run the command of train in a temporary folder inside `work`.

    Writes precompile.json: what was compiled, and for which graphs. Raises StageFailure, with the
    names of the graphs, when one could not be compiled.
    """
    prepare(settings, data)
    url = settings.neuron_compile_cache_url
    before = cache.entries(url)
    with cache.in_use(url):
        report = _compile(settings, data, work / "rehearsal")
    graphs = cache.entries(url)
    require_all_compiled(report, graphs, url)
    require_all_done(report, before, graphs, url)
    compiled = {entry.name for entry in graphs if entry.state == "done"}
    new = compiled - {entry.name for entry in before if entry.state == "done"}
    metrics: dict[str, int | None] = {
        "graphs": report.graphs,
        "compile_cache_hits": len(report.hits),
    }
    if cache.folder_of(url):
        metrics |= {
            "compile_cache_misses": len(new),
            "compile_cache_entries": len(compiled),
            "compile_cache_poisoned": sum(entry.state == "poisoned" for entry in graphs),
            "compile_cache_locked": sum(entry.state == "locked" for entry in graphs),
        }
    else:  # in S3, whose entries are not read
        metrics |= {
            "compile_cache_misses": report.succeeded,
            "compile_cache_entries": None,
            "compile_cache_poisoned": None,
            "compile_cache_locked": None,
        }
    write_json(
        work / PRECOMPILE_FILE,
        {
            **metrics,
            "graph_key": graph_key(settings),
            "graph_names": sorted(report.hits | new),
        },
    )
    counts = [
        f"{name.replace('_', ' ')} {number}"
        for name, number in metrics.items()
        if number is not None
    ]
    print(", ".join(counts), flush=True)
    return StageResult(device=device_name(), metrics=metrics, unkeyed=(PRECOMPILE_FILE,))


def _compile(settings: Settings, data: Path, rehearsal: Path) -> CompileReport:
    """Run neuron_parallel_compile in the folder `rehearsal`, which is removed afterwards."""
    shutil.rmtree(rehearsal, ignore_errors=True)
    rehearsal.mkdir()
    printed: list[str] = []
    try:
        launch(
            precompile_command(settings, data, rehearsal),
            environment(settings),
            rehearsal / "error",
            on_line=printed.append,
        )
    except StageFailure:
        report, url = read_compile_report(printed), settings.neuron_compile_cache_url
        if report.failed:  # the exit status is the number of graphs that failed
            require_all_compiled(report, cache.entries(url), url)
        raise
    finally:
        shutil.rmtree(rehearsal)
    return read_compile_report(printed)


def precompile_command(settings: Settings, data: Path, rehearsal: Path) -> list[str]:
    """neuron_parallel_compile and the command of train.

    Only the numbers of steps and the folder differ from train's, and nothing is saved.
    """
    command = training_command(
        replace(settings, save_steps=0, logging_steps=LOGGING_STEPS),
        base_model_folder(settings),
        data,
        rehearsal,
        steps=LOGGING_STEPS + STEPS_PAST_LOGGING,
    )
    # The default folder is the same for all runs of a user, and is emptied at each start.
    return [
        "neuron_parallel_compile",
        "--parallel_compile_workdir",
        str(rehearsal.absolute() / "compile"),
        *command,
    ]


def require_all_compiled(report: CompileReport, graphs: list[cache.Entry], url: str) -> None:
    """Raise StageFailure when a graph failed to compile, or when there is no summary."""
    if report.failed is None:
        raise StageFailure(
            "neuron_parallel_compile ended without its summary (`Total failed compilations`). Its "
            "output is above."
        )
    failed = sorted(report.failed_graphs | report.failed_hits)
    if report.failed or failed:
        count = max(report.failed, len(failed))
        names = "".join(f"\n  {name}" for name in failed) or " It does not say which."
        message = f"{count} of {report.graphs} graphs did not compile:{names}"
        raise StageFailure("\n".join([message, *cache.blocked(graphs, url)]))


def require_all_done(
    report: CompileReport, before: list[cache.Entry], graphs: list[cache.Entry], url: str
) -> None:
    """Raise StageFailure when a graph of this run is not compiled, whatever the summary says.

    neuron_parallel_compile passes over a graph that is locked, or whose compiler was killed: it is
    in no total, and the exit status is 0. Where it does not name its graphs, they are those that
    the cache lacked `before`. A cache in S3 is not read: there the report must account for all.
    """
    if cache.folder_of(url):
        own = report.extracted or {entry.name for entry in graphs} - {e.name for e in before}
        states = {entry.name: entry.state for entry in graphs}
        missing = {name: states.get(name, "gone") for name in own if states.get(name) != "done"}
        remedy = cache.blocked([entry for entry in graphs if entry.name in missing], url)
    else:
        own = report.extracted - report.hits
        missing = dict.fromkeys(own - report.compiled, "not in the report")
        if len(own) <= (report.graphs or 0):
            missing = {}
        remedy = [f"If nothing is compiling now, remove locks: {cache.clear_locks_command(url)}"]
    if missing:
        names = "".join(f"\n  {name} ({state})" for name, state in sorted(missing.items()))
        message = (
            f"{len(missing)} of this training's graphs are not compiled, although "
            f"neuron_parallel_compile reports no failure:{names}\nIf another process is compiling "
            "them, run the same command again when it has ended. If the compiler was killed, "
            "memory ran out."
        )
        raise StageFailure("\n".join([message, *remedy]))
