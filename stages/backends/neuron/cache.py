"""The Neuron compiler's cache of compiled graphs, as plain files: what is there, what blocks it, what a run added.

    <cache>/neuronxcc-<version>/MODULE_<graph>+<flags>/{model.hlo_module.pb, model.neff, model.done, model.log, *.lock}

A graph whose compilation failed leaves model.log instead of model.neff; only --retry_failed_compilation among the
compiler's flags makes a run try it again. A process that was killed leaves its *.lock, and the others wait for ever.

python -m stages.backends.neuron.cache status | lookup [MODEL_ID] | synchronize
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from stages.backends.neuron.arguments import cache_environment
from stages.run.cli import with_exit_status
from stages.run.errors import InputError, StageFailure
from stages.run.progress import duration, show_size
from stages.run.settings import Settings

STATES = ("done", "poisoned", "locked", "unfinished")

# How the Hub's libraries, in all their versions, say that there is no way to it, and that it says no.
UNREACHABLE = (
    "not reachable",
    "ConnectionError",
    "ConnectError",
    "OfflineMode",
    "LocalEntryNotFoundError",
    "Temporary failure in name",
)
REFUSED = (
    "401 Client Error",
    "403 Client Error",
    "RepositoryNotFoundError",
    "does not exist or you don't have access",
)


@dataclass(frozen=True)
class Entry:
    """One graph: `neuronxcc-VERSION/MODULE_x`, one of STATES, its files' bytes, and its oldest lock's age in seconds."""

    name: str
    state: str
    bytes: int
    lock_seconds: float | None = None

    @property
    def compiler(self) -> str:
        return self.name.partition("/")[0]


def folder_of(url: str | Path) -> Path | None:
    """The folder of a cache that lies in files; None for s3://, whose entries are not looked at here."""
    return None if str(url).startswith("s3:") else Path(url)


def entries(url: str | Path) -> list[Entry]:
    """Every graph in the cache, by name; empty where there is no cache yet, and for s3://."""
    root = folder_of(url)
    return (
        [_entry(module) for module in sorted(root.glob("neuronxcc-*/MODULE_*")) if module.is_dir()]
        if root
        else []
    )


def names(url: str | Path, state: str = "done") -> set[str]:
    """The names of the graphs in that state: what a run compiled is the difference of before and after."""
    return {entry.name for entry in entries(url) if entry.state == state}


def _entry(module: Path) -> Entry:
    sizes, locks = {}, []
    for path in module.rglob("*"):
        try:
            facts = path.stat()
        except FileNotFoundError:  # a compilation that ends while we look
            continue
        if path.is_dir():
            continue
        sizes[path.name] = facts.st_size
        if path.suffix == ".lock":
            locks.append(max(0.0, time.time() - facts.st_mtime))
    if sizes.get("model.neff") and "model.done" in sizes:  # written in this order
        state = "done"  # a lock that was left behind blocks nobody any more
    elif locks:
        state = "locked"
    else:
        state = "poisoned" if "model.log" in sizes or sizes.get("model.neff") == 0 else "unfinished"
    name = f"{module.parent.name}/{module.name}"
    return Entry(
        name, state, sum(sizes.values()), max(locks) if locks and state == "locked" else None
    )


def summary(found: Sequence[Entry]) -> dict[str, dict[str, int]]:
    """Compiler version -> number of graphs in each of STATES, and `bytes`."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys((*STATES, "bytes"), 0))
    for entry in found:
        counts[entry.compiler][entry.state] += 1
        counts[entry.compiler]["bytes"] += entry.bytes
    return dict(counts)


def blocked(found: Sequence[Entry], url: str | Path) -> list[str]:
    """What keeps graphs from being compiled, and the command that mends it; empty where nothing does."""
    poisoned = [entry for entry in found if entry.state == "poisoned"]
    locked = [entry for entry in found if entry.state == "locked"]
    lines = []
    if poisoned:
        lines.append(
            f"{_graphs(poisoned)} failed to compile; without --retry_failed_compilation a run ends at them. See model.log, then:"
        )
        lines += [f"  rm -r '{Path(url) / entry.name}'" for entry in poisoned]
    if locked:
        oldest = duration(max(entry.lock_seconds or 0.0 for entry in locked))
        lines.append(
            f"{_graphs(locked)} locked, the longest for {oldest}. If nothing compiles now, a killed run left them; remove them:"
        )
        lines.append(
            f"  NEURON_COMPILE_CACHE_URL='{url}' neuron_parallel_compile --command clear-locks"
        )
    return lines


def _graphs(found: Sequence[Entry]) -> str:
    return f"{len(found)} graph{'' if len(found) == 1 else 's'}"


def report(url: str) -> str:
    """What `status` prints: a line per compiler version, then what is blocked."""
    if folder_of(url) is None:
        return f"compile cache {url}: in S3, not looked at here (`aws s3 ls --recursive {url}`)"
    found = entries(url)
    if not found:
        return f"compile cache {url}: no graphs yet; precompile fills it"
    counts = summary(found)
    width = max(map(len, counts))
    lines = [
        f"compile cache {url}",
        f"{'compiler':<{width}}" + "".join(f"{state:>12}" for state in STATES) + f"{'size':>10}",
    ]
    for compiler, count in sorted(counts.items()):
        numbers = "".join(f"{count[state]:>12}" for state in STATES)
        lines.append(f"{compiler:<{width}}{numbers}{show_size(count['bytes']):>10}")
    return "\n".join([*lines, *blocked(found, url)])


def lookup_command(settings: Settings, model: str) -> list[str]:
    """optimum-neuron's search for compiled inference graphs of `model` on the Hub."""
    repository = ["--repo_id", settings.custom_cache_repo] if settings.custom_cache_repo else []
    return [
        "optimum-cli",
        "neuron",
        "cache",
        "lookup",
        model,
        "--task",
        "text-generation",
        *repository,
    ]


def synchronize_command(settings: Settings) -> list[str]:
    """optimum-neuron's upload of the cache to CUSTOM_CACHE_REPO; raises InputError where that would go wrong."""
    url, problems = settings.neuron_compile_cache_url, []
    if not settings.custom_cache_repo:
        problems.append(
            "CUSTOM_CACHE_REPO is not set, and the default, aws-neuron/optimum-neuron-cache, is for reading alone. "
            "Make a repository (`optimum-cli neuron cache create --name NAME`) and set CUSTOM_CACHE_REPO=OWNER/NAME."
        )
    root, found = folder_of(url), entries(url)
    if root is None:
        problems.append(
            f"NEURON_COMPILE_CACHE_URL={url}: optimum-neuron uploads a folder alone. Copy the bucket to one and name that."
        )
    elif not names(url):
        problems.append(
            f"NEURON_COMPILE_CACHE_URL={url} holds no compiled graph to upload. Run precompile first."
        )
    # The upload takes every file, failed graphs and locks too: whoever downloads them is blocked as well.
    if waiting := blocked(found, url):
        problems.append(
            "\n".join(["The cache holds what would block all who download it.", *waiting])
        )
    if problems:
        raise InputError(problems)
    return [
        "optimum-cli",
        "neuron",
        "cache",
        "synchronize",
        "--repo_id",
        settings.custom_cache_repo,
        "--cache_dir",
        url,
    ]


def run(command: list[str], settings: Settings) -> None:
    """Run optimum-cli on the cache that training uses; raises with the last line of what it says when it fails."""
    here = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    tool = shutil.which(command[0], path=here)
    if tool is None:
        raise InputError(
            f"{command[0]} is not installed here; it comes with optimum-neuron (docker/requirements.txt). Use the image."
        )
    repository = (
        {"CUSTOM_CACHE_REPO": settings.custom_cache_repo} if settings.custom_cache_repo else {}
    )
    environment = {**os.environ, **cache_environment(settings), **repository}
    done = subprocess.run(
        [tool, *command[1:]], env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if done.returncode:
        raise StageFailure(_failure(command, done.stderr))
    sys.stderr.write(done.stderr)


def _failure(command: list[str], said: str) -> str:
    last = (said.strip().splitlines() or ["(it said nothing)"])[-1]
    what = f"`{' '.join(command)}` failed: {last if len(last) <= 300 else f'{last[:300]} ...'}"
    if any(word in said for word in UNREACHABLE):
        return f"{what}\nThe Hub cannot be reached from here. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
    if any(word in said for word in REFUSED):
        return f"{what}\nThe Hub refuses it. Check CUSTOM_CACHE_REPO; `hf auth login`, or set HF_TOKEN to a token that may write there."
    return what


@click.group(help="The Neuron compiler's cache of compiled graphs.")
def main() -> None:
    pass


@main.command(help="Graphs by compiler version and state, and what to remove.")
def status() -> None:
    with_exit_status(lambda: print(report(Settings.read().neuron_compile_cache_url)))


@main.command(help="Compiled inference graphs of MODEL_ID on the Hub.")
@click.argument("model_id", required=False)
def lookup(model_id: str | None) -> None:
    def look() -> None:
        settings = Settings.read()
        run(lookup_command(settings, model_id or settings.model_id), settings)

    with_exit_status(look)


@main.command(help="Upload the cache to CUSTOM_CACHE_REPO.")
def synchronize() -> None:
    def upload() -> None:
        settings = Settings.read()
        run(synchronize_command(settings), settings)

    with_exit_status(upload)


if __name__ == "__main__":
    main()
