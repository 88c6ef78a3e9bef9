"""Where MODEL_ID and DATASET are: on this machine, or on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from stages.run.errors import InputError

# What huggingface_hub accepts as the id of a repository, seen from its characters.
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def local_path(setting: str, name: str, kind: str, suffixes: tuple[str, ...] = ()) -> Path | None:
    """The local path that `setting` names; None where `name` is an id on the Hub.

    A name that exists here is a path. Of names that do not, those that look like one (they begin
    with `/`, `.` or `~`, have two slashes, or end in one of `suffixes`) raise InputError, which
    asks for a `kind`.
    """
    if os.path.lexists(name):
        return Path(name)
    if not _HUB_ID.fullmatch(name) or name.lower().endswith(suffixes):
        raise InputError(
            f"{setting}={name[:200]} does not exist. Name {kind}, or OWNER/NAME on the Hub."
        )
    return None


def local_model(model: str) -> Path | None:
    """The folder that MODEL_ID names; None where it is an id on the Hub."""
    kind = "a folder in the Hugging Face layout"
    path = local_path("MODEL_ID", model, kind)
    if path is not None and not path.is_dir():
        problem = "is not a folder" if path.exists() else "is a broken link"
        raise InputError(f"MODEL_ID={model} {problem}. Name {kind}, or OWNER/NAME on the Hub.")
    return path


def own_output_problems(model: str, run_folder: Path) -> list[str]:
    """A message when MODEL_ID is what the run in `run_folder` itself publishes: each make would
    train again, from its own last output, and overwrite what it began from."""
    run, base = os.path.realpath(run_folder), os.path.realpath(model.replace("\0", ""))
    if not os.path.lexists(model) or os.path.commonpath([run, base]) != run:
        return []
    return [
        f"MODEL_ID={model} is inside {run_folder}, which this run overwrites. Set another RUN to "
        "train it further."
    ]
