"""Fills the Neuron compile cache: neuron_parallel_compile runs the training command far enough to see each of its graphs.

It collects the graphs of a few steps without computing anything, then compiles them side by side. What decides which graphs
there are is written down, so that train can tell, before it starts, when it would have to compile again.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from stages.backends.neuron import cache
from stages.backends.neuron.arguments import environment, training_command
from stages.backends.neuron.compile_inference import compile_problems
from stages.backends.neuron.compile_report import CompileReport, read_compile_report
from stages.backends.neuron.graph_key import graph_key
from stages.backends.neuron.parallel_sizes import device_name
from stages.backends.neuron.train import prepare
from stages.model.base import base_config, base_model_folder
from stages.run.errors import InputError, StageFailure
from stages.run.json_file import write_json
from stages.run.launch import launch
from stages.run.layout import PRECOMPILE_FILE
from stages.run.publish import StageResult
from stages.run.settings import Settings

# NeuronTrainer reduces the loss where it logs, in a graph of its own: a run has to come past that boundary.
STEPS_PAST_LOGGING = 5


def precompile(settings: Settings, data: Path, work: Path) -> StageResult:
    """Run the command of train in a throw-away folder below `work`; leaves precompile.json, what was compiled and for what.

    Raises StageFailure, naming the graphs, when one could not be compiled.
    """
    prepare(settings, data)
    if problems := list(compile_problems(settings, base_config(settings))):
        raise InputError(problems)
    url = settings.neuron_compile_cache_url
    before = cache.names(url)
    throw_away = work / "throw-away"
    shutil.rmtree(throw_away, ignore_errors=True)
    throw_away.mkdir()
    printed: list[str] = []
    try:
        launch(
            precompile_command(settings, data, throw_away),
            environment(settings),
            throw_away / "error",
            on_line=printed.append,
        )
    except StageFailure:
        if read_compile_report(printed).failed:  # its exit status is their number
            require_all_compiled(read_compile_report(printed), cache.entries(url), url)
        raise
    finally:
        shutil.rmtree(throw_away)
    found = read_compile_report(printed)
    entries = cache.entries(url)
    require_all_compiled(found, entries, url)
    done = {entry.name for entry in entries if entry.state == "done"}
    report: dict[str, int | None] = {"graphs": found.graphs, "compile_cache_hits": len(found.hits)}
    looked = cache.folder_of(url) is not None  # else in S3
    report |= {
        "compile_cache_misses": len(done - before) if looked else found.succeeded,
        "compile_cache_entries": len(done) if looked else None,
        **{
            f"compile_cache_{state}": sum(e.state == state for e in entries) if looked else None
            for state in ("poisoned", "locked")
        },
    }
    write_json(
        work / PRECOMPILE_FILE,
        {
            **report,
            "graph_key": graph_key(settings),
            "graph_names": sorted(found.hits | (done - before)),
        },
    )
    print(
        ", ".join(
            f"{name.replace('_', ' ')} {number}"
            for name, number in report.items()
            if number is not None
        ),
        flush=True,
    )
    return StageResult(device=device_name(), metrics=report, unkeyed=(PRECOMPILE_FILE,))


def precompile_command(settings: Settings, data: Path, throw_away: Path) -> list[str]:
    """neuron_parallel_compile and the very command of train, but for the number of steps, the folder and that nothing is saved."""
    few = replace(settings, save_steps=0)
    command = training_command(
        few,
        base_model_folder(settings),
        data,
        throw_away,
        steps=settings.logging_steps + STEPS_PAST_LOGGING,
    )
    # Its own folder is one for all of a user's runs, and is emptied at each start.
    return [
        "neuron_parallel_compile",
        "--parallel_compile_workdir",
        str(throw_away.absolute() / "compile"),
        *command,
    ]


def require_all_compiled(found: CompileReport, entries: list[cache.Entry], url: str) -> None:
    """Raise StageFailure when a graph failed to compile, or when the compiler never came to its summary."""
    if found.failed is None:
        raise StageFailure(
            "neuron_parallel_compile ended without its summary (`Total failed compilations`): what it printed is above."
        )
    failed = sorted(found.failed_graphs | found.failed_hits)
    if found.failed or failed:
        count = max(found.failed, len(failed))
        names = "".join(f"\n  {name}" for name in failed) or " It does not say which."
        raise StageFailure(
            "\n".join(
                [
                    f"{count} of {found.graphs} graphs did not compile:{names}",
                    *cache.blocked(entries, url),
                ]
            )
        )
