"""Compiled graphs in CUSTOM_CACHE_REPO on the Hub, and what happens when the Hub refuses.

optimum-neuron asks the Hub, in every rank, for every graph that the local cache lacks. Any answer
other than yes or no (429, 5xx, a lost connection) would end a training or an export (optimum-neuron
0.4.5, cache/hub_cache.py). Here such a graph is one that the Hub does not have: it is compiled.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

# Seconds between attempts. Compiling one graph of a 7B model takes minutes.
PAUSES = (1.0, 5.0)


def survive_refusals() -> None:
    """Make this process compile, and say so once, where the Hub refuses to say what it has.

    After that the process does not ask the Hub any more. Without CUSTOM_CACHE_REPO it never asks.
    """
    repository = os.environ.get("CUSTOM_CACHE_REPO")
    if not repository:
        return
    from optimum.neuron.cache.hub_cache import CompileCacheHfProxy

    upstream_open, upstream_exists = CompileCacheHfProxy.__init__, CompileCacheHfProxy.exists
    refusals: list[Exception] = []

    def refused(error: Exception) -> None:
        if not refusals:
            print(refusal_note(repository, error), flush=True)
        refusals.append(error)

    def open_repository(self: Any, *args: Any, **kwargs: Any) -> None:
        # Where this raises, optimum-neuron takes the local cache, without a word at our log level.
        if refusals:
            raise refusals[0]
        try:
            _patiently(lambda: upstream_open(self, *args, **kwargs))
        except Exception as error:
            refused(error)
            raise

    def fetched(self: Any, path: str) -> bool:
        # What the Hub has is fetched at once: a refusal afterwards would end the training. The
        # download that follows then takes the file from the Hub's cache on this machine.
        if not upstream_exists(self, path):
            return False
        if not self.default_cache.exists(path):
            self.api.hf_hub_download(self.repo_id, self._rel_path(path))
        return True

    def exists(self: Any, path: str) -> bool:
        if refusals:
            return bool(self.default_cache.exists(path))
        try:
            return bool(_patiently(lambda: fetched(self, path)))
        except Exception as error:
            refused(error)
            return False

    CompileCacheHfProxy.__init__, CompileCacheHfProxy.exists = open_repository, exists


def refusal_note(repository: str, error: Exception) -> str:
    rank = os.environ.get("RANK")
    return (
        f"note: {f'rank {rank}: ' if rank else ''}CUSTOM_CACHE_REPO={repository}: the Hub does not "
        f"say which graphs it has ({str(error).strip().splitlines()[0]}). Graphs that the local "
        "cache lacks are compiled."
    )


def _patiently(ask: Callable[[], Any]) -> Any:
    """The result of `ask`, which is called again after each of PAUSES while it raises."""
    for pause in PAUSES:
        try:
            return ask()
        except Exception:
            time.sleep(pause)
    return ask()
