"""The other half of test_kills.py's kills, in a training whose processes share each layer's
weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.killing import killed_demo
from tests.torture.plugin import Torture


@pytest.mark.torture("kills")
def test_the_demo_killed_in_every_stage_ends_as_an_undisturbed_one(
    torture: Torture, tmp_path: Path
) -> None:
    torture.require_long()
    killed_demo(torture, tmp_path, ("NPROC_PER_NODE=2", "TENSOR_PARALLEL_SIZE=2"), half=1)
