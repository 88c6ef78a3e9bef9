"""The graphs of a training step and their entries in the compile cache.

A graph is the list of what would shape it. As with the compiler, a graph that the cache lacks is
compiled (a file is written), under neuron_parallel_compile it is only left there for it, and an
entry whose compilation failed, or that is locked, stops the training.
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import datetime
from pathlib import Path

import neuronxcc

_notes: set[str] = set()


def collecting() -> bool:
    return os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1"


def traced(note: str) -> None:
    """Something that shapes the graph of the step that is being traced."""
    _notes.add(note)


def take_trace() -> list[str]:
    notes = sorted(_notes)
    _notes.clear()
    return notes


def cache_path() -> Path:
    given = [
        flag.removeprefix("--cache_dir=")
        for flag in os.environ.get("NEURON_CC_FLAGS", "").split()
        if flag.startswith("--cache_dir=")
    ]
    return Path(
        given[-1]
        if given
        else os.environ.get("NEURON_COMPILE_CACHE_URL", "/var/tmp/neuron-compile-cache")
    )


def compile_graph(description: list[str]) -> None:
    """Find the graph in the cache, or leave it there: compiled, or for neuron_parallel_compile to
    compile."""
    flags = [
        flag
        for flag in os.environ.get("NEURON_CC_FLAGS", "").split()
        if not flag.startswith("--cache_dir=")
    ]
    module = hashlib.sha256(json.dumps(description).encode()).hexdigest()[:20]
    key = hashlib.sha256(json.dumps(flags).encode()).hexdigest()[:8]
    entry = cache_path() / f"neuronxcc-{neuronxcc.__version__}" / f"MODULE_{module}+{key}"
    if _in_cache(entry / "model.done") and _in_cache(entry / "model.neff"):
        _say(f"Using a cached neff at {entry / 'model.neff'}")
        return
    if (entry / "model.log").exists() and "--retry_failed_compilation" not in flags:
        _say(
            f"Got a cached failed neff at {entry / 'model.neff'}. Will skip compilation, please "
            "set --retry_failed_compilation"
        )
        raise RuntimeError("a graph could not be compiled")
    if not collecting() and list(entry.glob("*.lock")):
        raise RuntimeError(f"{entry} is locked; the real compiler waits here, without an end")
    entry.mkdir(parents=True, exist_ok=True)
    (entry / "model.hlo_module.pb").write_text("\n".join(description), encoding="utf-8")
    (entry / "compile_flags.json").write_text(json.dumps(flags), encoding="utf-8")
    if collecting():
        _say(
            f"Extracting graphs ({entry / 'model.hlo_module.pb'}) for ahead-of-time parallel "
            "compilation. No compilation was done."
        )
    else:
        _say(f"Call compiler with cmd: neuronx-cc compile {entry.name}")
        write_neff(entry)


def _in_cache(file: Path) -> bool:
    """Whether the cache has the file: here, or where optimum-neuron's class of caches looks."""
    from libneuronxla import neuron_cc_cache as caches

    cache = caches.create_compile_cache(caches.CacheUrl.get_cache_url(str(cache_path())))
    return cache.exists(str(file))


def _say(text: str) -> None:
    now = datetime.now()
    print(
        f"{now:%Y-%m-%d %H:%M:%S}.{now.microsecond // 1000:06d}:  {os.getpid()}  INFO "
        f"||NEURON_CC_WRAPPER||: {text}",
        flush=True,
    )


def write_neff(entry: Path) -> None:
    (entry / "model.neff").write_bytes(
        b"NEFF" + hashlib.sha256((entry / "model.hlo_module.pb").read_bytes()).digest()
    )
    (entry / "model.done").touch()
