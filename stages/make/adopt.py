"""`make adopt STAGE=train`: take what a stage published for up to date after a change that is known
to be harmless. Its manifest says so from then on, with what it was really made from.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from stages.run.errors import InputError
from stages.run.lock import locked
from stages.run.manifest import file_problems, manifest_of, manifest_problem
from stages.run.provenance import accepted, differences, provenance_now
from stages.run.publish import rewrite_manifest
from stages.run.settings import Settings


def adopt(stage: str, settings: Settings, inputs: list[str], run_folder: Path) -> list[str]:
    """Accept the published output of `stage`; returns the differences that were accepted.

    Raises InputError where there is nothing to accept, or files are not as they were published.
    """
    output = run_folder / stage
    _published(output)  # before the lock, which would make the folder of a run that is none
    with locked(run_folder, f"adopt {stage}"):
        published = _published(output)
        if damaged := file_problems(published, output):
            raise InputError(f"{output}: {'; '.join(damaged)}. Make it again instead.")
        folders = {name: run_folder / name for name in inputs}
        now, seen = provenance_now(stage, settings, folders, published)
        reasons = differences(accepted(published), now)
        if not reasons:
            raise InputError(f"{stage} differs in nothing of its own: there is nothing to adopt.")
        published.setdefault("adopted", []).append(
            {
                "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "in_spite_of": reasons,
                "provenance": now,
            }
        )
        rewrite_manifest(output, {**published, "seen": seen})
    return reasons


def _published(output: Path) -> dict[str, Any]:
    manifest = manifest_of(output)
    if manifest is None:
        raise InputError(f"{output}: {manifest_problem(output)}. There is nothing to adopt.")
    return manifest
