"""The Neuron compiler's cache of compiled graphs, read as plain files.

    <cache>/neuronxcc-<version>/MODULE_<graph>+<flags>/
        model.hlo_module.pb  model.neff  model.done  model.log  *.lock

A graph that failed to compile has a model.log instead of a model.neff; runs try it again only if
--retry_failed_compilation is among the compiler's flags. A process that was killed leaves its
*.lock: neuron_parallel_compile passes over such a graph without a word, and a training waits for it
forever. So stages hold the cache while they compile (`in_use`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from stages.run.lock import shared
from stages.run.progress import duration

STATES = ("done", "poisoned", "locked", "unfinished")
# optimum-neuron's upload of a cache leaves out a file of this name (cache/hub_cache.py).
LOCK_FILE = "lock"


@dataclass(frozen=True)
class Entry:
    """One graph: its name `neuronxcc-VERSION/MODULE_x`, one of STATES, and its size in bytes.

    `lock_seconds` is the age of its oldest lock, None unless it is locked.
    """

    name: str
    state: str
    bytes: int
    lock_seconds: float | None = None

    @property
    def compiler(self) -> str:
        return self.name.partition("/")[0]


def folder_of(url: str | Path) -> Path | None:
    """The folder of the cache; None for s3://, whose entries are not read."""
    return None if str(url).startswith("s3:") else Path(url)


def entries(url: str | Path) -> list[Entry]:
    """Every graph in the cache, by name; empty if there is no cache yet, and for s3://."""
    root = folder_of(url)
    return (
        [_entry(module) for module in sorted(root.glob("neuronxcc-*/MODULE_*")) if module.is_dir()]
        if root
        else []
    )


def names(url: str | Path, state: str = "done") -> set[str]:
    """The names of the graphs in that state.

    What a run compiled is the difference between the names after it and before it.
    """
    return {entry.name for entry in entries(url) if entry.state == state}


@contextmanager
def in_use(url: str | Path) -> Iterator[None]:
    """Hold the cache while something of ours compiles into it; several stages may at once.

    While nobody else holds it, a locked graph is one whose compiler was killed: its locks are
    removed, and a line says so. Other locks are left alone (another stage may be compiling, the
    cache is another user's or cannot be held); a line says so if there are any, because a training
    waits for them. Locks in S3 are not read.
    """
    folder = folder_of(url)
    with ExitStack() as held:
        if folder:
            reason = "another stage uses the cache, or they are another user's"
            try:
                held.enter_context(shared(folder / LOCK_FILE, lambda: _clear_locks(folder)))
            except OSError as error:
                reason = f"{folder / LOCK_FILE}: {error.strerror}"
            if lines := blocked([e for e in entries(url) if e.state == "locked"], url):
                print(
                    f"note: locks in the compile cache are left alone ({reason}).",
                    *lines,
                    sep="\n",
                    flush=True,
                )
        yield


def _clear_locks(folder: Path) -> None:
    """Remove every lock in the cache, where no process of ours can hold one."""
    before = {entry.name: entry for entry in entries(folder) if entry.state == "locked"}
    for name in before:
        for path in (folder / name).rglob("*.lock"):
            with suppress(PermissionError):  # another user's
                path.unlink(missing_ok=True)
    stale = [before[name] for name in before.keys() - names(folder, "locked")]
    if stale:
        oldest = duration(max(entry.lock_seconds or 0.0 for entry in stale))
        print(
            f"compile cache {folder}: no stage is compiling, so {_count(stale)} locked for up to "
            f"{oldest} had lost their compilers; the locks are removed",
            flush=True,
        )


def _entry(module: Path) -> Entry:
    sizes, lock_ages = {}, []
    for path in module.rglob("*"):
        try:
            stat = path.stat()
        except FileNotFoundError:  # a compilation that ends at this moment
            continue
        if path.is_dir():
            continue
        sizes[path.name] = stat.st_size
        if path.suffix == ".lock":
            lock_ages.append(max(0.0, time.time() - stat.st_mtime))
    if sizes.get("model.neff") and "model.done" in sizes:  # written in this order
        state = "done"  # a lock that is left over blocks no process any more
    elif lock_ages:
        state = "locked"
    else:
        state = "poisoned" if "model.log" in sizes or sizes.get("model.neff") == 0 else "unfinished"
    return Entry(
        f"{module.parent.name}/{module.name}",
        state,
        sum(sizes.values()),
        max(lock_ages) if state == "locked" else None,
    )


def summary(graphs: Sequence[Entry]) -> dict[str, dict[str, int]]:
    """Compiler version -> number of graphs in each of STATES, and their `bytes`."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys((*STATES, "bytes"), 0))
    for entry in graphs:
        counts[entry.compiler][entry.state] += 1
        counts[entry.compiler]["bytes"] += entry.bytes
    return dict(counts)


def blocked(graphs: Sequence[Entry], url: str | Path) -> list[str]:
    """What keeps graphs from being compiled, and the commands that fix it; empty if nothing."""
    poisoned = [entry for entry in graphs if entry.state == "poisoned"]
    locked = [entry for entry in graphs if entry.state == "locked"]
    lines = []
    if poisoned:
        lines.append(
            f"{_count(poisoned)} failed to compile; without --retry_failed_compilation a run ends "
            "at them. Read their model.log, then remove them:"
        )
        lines += [f"  rm -r '{Path(url) / entry.name}'" for entry in poisoned]
    if locked:
        oldest = duration(max(entry.lock_seconds or 0.0 for entry in locked))
        lines.append(
            f"{_count(locked)} locked, the longest for {oldest}. If nothing is compiling now, a "
            "run that was killed left the locks. Remove them:"
        )
        lines.append(f"  {clear_locks_command(url)}")
    return lines


def clear_locks_command(url: str | Path) -> str:
    return f"NEURON_COMPILE_CACHE_URL='{url}' neuron_parallel_compile --command clear-locks"


def _count(graphs: Sequence[Entry]) -> str:
    return f"{len(graphs)} graph{'' if len(graphs) == 1 else 's'}"
