"""What is known of a run: its manifests, the logged steps and the answers.

Everything is read as it is now, also while a stage runs. Nothing is locked, checked or computed
again, so that no stage waits for the page.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from stages.backends.metrics import lines_after
from stages.model.files import model_files
from stages.run.digests import content_digest, files_below, signature
from stages.run.layout import ANSWERS_FILE, COMPARISON_FILE, METRICS_FILE
from stages.run.manifest import manifest_of, manifest_problem
from stages.run.settings import Settings

STAGES = ("data", "precompile", "train", "consolidate", "compile-inference", "eval")
ANSWERS_SHOWN = 20
SMALL = 20_000_000  # bytes that are read to see what they are


@dataclass(frozen=True)
class Facts:
    """One run. `manifests`: those of the stages that have published. `missing`: stage -> why it has
    none. `steps`: the lines of metrics.jsonl. `unfinished`: whether they are of a training that has
    not published; `names`: MODEL_ID and DATASET as they are called. The two lists of answers hold
    at most ANSWERS_SHOWN."""

    run: str
    manifests: dict[str, dict[str, Any]]
    missing: dict[str, str]
    steps: list[dict[str, Any]]
    unfinished: bool
    names: dict[str, str]
    compared: list[dict[str, Any]]
    answers: list[dict[str, Any]]

    def metrics(self, stage: str) -> dict[str, Any]:
        return self.manifests.get(stage, {}).get("metrics") or {}

    def settings(self, stage: str) -> dict[str, Any]:
        """The settings that the stage's output was made from."""
        return self.manifests.get(stage, {}).get("provenance", {}).get("settings", {})


def facts_of(folder: Path, settings: Settings) -> Facts:
    """What is known of the run in `folder`. `settings` are today's: they name a local model or
    dataset, whose digest alone is recorded."""
    manifests = {name: made for name in STAGES if (made := manifest_of(folder / name))}
    missing = {name: manifest_problem(folder / name) for name in STAGES if name not in manifests}
    # A training that was given up may have left steps that are older than the published ones.
    published = folder / "train" / METRICS_FILE
    newest = max([published, *folder.glob(f".work/train-*/{METRICS_FILE}")], key=_written)
    return Facts(
        run=folder.name,
        manifests=manifests,
        missing=missing,
        steps=lines_after(newest, -1),
        unfinished=newest != published,
        names={
            "model": _name("MODEL_ID", "model", manifests.get("train"), settings.model_id),
            "dataset": _name("DATASET", "dataset", manifests.get("data"), settings.dataset),
        },
        compared=_lines(folder / "eval" / COMPARISON_FILE),
        answers=_lines(folder / "eval" / ANSWERS_FILE),
    )


def _written(path: Path) -> float:
    """When `path` was last written; 0.0 where it is not, or no longer, there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _name(variable: str, kind: str, made: dict[str, Any] | None, now: str) -> str:
    """What MODEL_ID or DATASET is called: its id on the Hub; today's name where the local files are
    those that were read, or nothing was read yet; else the beginning of their SHA-256."""
    recorded = str((made or {}).get("provenance", {}).get("settings", {}).get(variable, ""))
    if made is None or not recorded.startswith("sha256:"):
        return recorded or now
    path, seen = Path(now), made["seen"]["files"].get(variable)
    if path.exists():
        files = [*(model_files(path) if variable == "MODEL_ID" else files_below(path))]
        small = sum(file.stat().st_size for file in files) <= SMALL
        # A copy of the files has another signature, and the same content.
        if seen == signature(path, files) or (
            small and recorded == f"sha256:{content_digest(path, files)}"
        ):
            return now
    return f"local {kind} {recorded[7:15]}"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The first objects of a JSON Lines file; none where it is missing or cut."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            read = [json.loads(line) for line in islice(file, ANSWERS_SHOWN)]
    except (OSError, ValueError, RecursionError):
        return []
    return [one for one in read if isinstance(one, dict)]
