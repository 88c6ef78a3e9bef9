"""Whatever is killed, whenever: the next make continues, nothing half written is published, and the
weights are the same bits.

Data-parallel processes here, tensor-parallel ones in test_kills_tensor_parallel.py: each makes half
of the kills.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Project
from tests.torture.killing import Killing, every_kill, killed_demo, require_undisturbed
from tests.torture.plugin import Torture

pytestmark = pytest.mark.torture("kills")
UNDISTURBED_SECONDS = {
    "data": 1.0,
    "precompile": 6.0,
    "train": 6.0,
    "consolidate": 3.0,
    "compile-inference": 6.0,
    "eval": 3.0,
}


def test_the_demo_killed_in_every_stage_ends_as_an_undisturbed_one(
    torture: Torture, tmp_path: Path
) -> None:
    torture.require_long()
    killed_demo(torture, tmp_path, ("NPROC_PER_NODE=2",), half=0)


def test_a_run_that_is_killed_ends_as_an_undisturbed_one(torture: Torture, built: Project) -> None:
    """The short form: a kill in each stage but the last, and every kind of victim."""
    killing = Killing(
        built, ("RECIPE=tiny", "SAVE_STEPS=1"), "killed", torture.seed, UNDISTURBED_SECONDS
    )
    kills = every_kill(torture.random)
    victims = [
        ("data", "stage"),
        ("precompile", "launcher"),
        ("train", "rank"),
        ("train", "make"),
        ("consolidate", "stage"),
    ]
    for stage, victim in [*victims, ("compile-inference", "compiling process")]:
        if stage == "compile-inference":
            killing.make("consolidate")
        killing.kill(
            torture.random.choice(
                [kill for kill in kills if (kill.stage, kill.victim) == (stage, victim)]
            )
        )
        torture.count()
    require_undisturbed(killing, "tiny")
