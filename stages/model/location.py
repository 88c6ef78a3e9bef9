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
    if not _HUB_ID.fullmatch(name) or name.endswith(suffixes):
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
