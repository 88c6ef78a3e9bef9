"""A training on a CPU takes its memory from tcmalloc where that is installed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stages.run import allocator

installed = pytest.mark.skipif(allocator.tcmalloc() is None, reason="tcmalloc is not installed")


@installed
def test_a_process_with_this_environment_has_tcmalloc_and_says_nothing_of_it() -> None:
    script = "x = bytearray(3 << 29); print('tcmalloc' in open('/proc/self/maps').read())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **allocator.environment()},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


@installed
def test_what_the_user_loads_first_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libm.so.6")
    assert allocator.environment()["LD_PRELOAD"] == f"{allocator.tcmalloc()} libm.so.6"


def test_an_allocator_that_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert not allocator.environment() and not allocator.advice()


def test_where_it_is_missing_nothing_changes_and_the_advice_is_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(allocator, "find_library", lambda name: None)
    assert not allocator.environment()
    assert "apt install libtcmalloc-minimal4" in allocator.advice()
