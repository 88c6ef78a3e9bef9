"""The memory of a process."""

from __future__ import annotations

import subprocess
import sys

from stages.run.host import peak_resident
from tests.conftest import ROOT


def test_a_peak_stays_after_the_memory_is_freed() -> None:
    before = peak_resident()
    memory = bytearray(b"x") * (200 * 10**6)
    del memory
    after = peak_resident()
    assert before is not None and after is not None
    assert after >= 200 * 10**6 and after >= before


def test_a_peak_is_not_that_of_the_process_that_started_it() -> None:
    """getrusage's is, after a spawn: a rank would be as large as its launcher."""
    memory = bytearray(b"x") * (300 * 10**6)
    asked = "from stages.run.host import peak_resident; print(peak_resident())"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True)
    assert len(memory) and int(done.stdout) < 100 * 10**6
