"""Packages that were compiled before, for all runs: they hold no weights, so another model of the
same shape can use them.

Packages are kept when their logits have been compared with the eager model's, and a model that
takes them is compared again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stages.backends.torch.generate import STEPS
from stages.run.digests import file_digest
from stages.run.fingerprint import code_of

PACKAGES = Path("outputs/.cache/packages")
KEPT = 20  # the last that were made; those of a model take 4 to 10 MB
DIGESTS = "digests.json"
FILES = [f"{step}.pt2" for step in STEPS]


def place_of(config: dict[str, Any], *compiled_for: Any) -> Path:
    """The folder for packages of a model with this config.json, `compiled_for` these sizes, device
    and instructions, by this code and these libraries."""
    libraries = [version("torch"), version("transformers")]  # without importing transformers
    parts = [config, compiled_for, code_of("compile-inference", "torch"), libraries]
    text = json.dumps(parts, sort_keys=True)
    return PACKAGES / hashlib.sha256(text.encode()).hexdigest()[:32]


def take(place: Path, output: Path) -> bool:
    """Copy the packages in `place` to `output`; False, and `place` is removed, where they are
    missing or damaged."""
    try:
        for name in FILES:
            shutil.copyfile(place / name, output / name)
        if json.loads((place / DIGESTS).read_bytes()) == _digests(output):
            return True
    except (OSError, ValueError):
        pass
    shutil.rmtree(place, ignore_errors=True)
    return False


def keep(place: Path, output: Path) -> None:
    """Keep the packages in `output` as `place`, and remove the oldest. A disk that takes nothing
    ends no stage."""
    try:
        _copy(output, place)
    except OSError as error:
        print(f"note: the packages are not kept for other runs: {error}", flush=True)
    with suppress(OSError):  # another run removes the oldest, too
        found = sorted(PACKAGES.iterdir(), key=lambda folder: folder.stat().st_mtime)
        for old in found[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)


def _copy(output: Path, place: Path) -> None:
    """In one step: other runs may do so at the same time."""
    PACKAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PACKAGES, prefix=".") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        for name in FILES:
            shutil.copyfile(output / name, new / name)
        (new / DIGESTS).write_text(json.dumps(_digests(output)), encoding="utf-8")
        with suppress(OSError):  # they are there already
            new.rename(place)


def _digests(folder: Path) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in FILES}
