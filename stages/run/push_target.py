"""PUSH_DATASET: where packed sequences may be pushed, and where each run's were pushed last.

Standard library only: make reads both at every start.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from stages.run.errors import InputError
from stages.run.json_file import write_json
from stages.run.manifest import manifest_of

_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]((/(?!\.\.?/)[\w.=+-]+)+)/?", re.ASCII)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_RECORD = ".pushed.json"  # beside the stages' folders: what data publishes stays as it is


def check_push_target(text: str) -> None:
    """Raise InputError unless `text` is s3://BUCKET/PREFIX, OWNER/NAME, or empty."""
    hub_id = _HUB_ID.fullmatch(text) and len(text) <= 96 and not re.search(r"--|\.\.|\W$", text)
    if not text or hub_id or _BUCKET.fullmatch(f"{text.rstrip('/')}/"):
        return
    if "@" in text or "?" in text:  # do not print what may be a key
        raise InputError(
            "a target holds no credentials. Write s3://BUCKET/PREFIX or OWNER/NAME, and export "
            "AWS_* or HF_TOKEN."
        )
    raise InputError(
        f"{text[:60]!r} is no place for packed sequences. Write s3://BUCKET/PREFIX (letters, "
        "digits, . _ = + - and /), or OWNER/NAME of a private dataset on the Hub."
    )


def overwrites(target: str, dataset: str) -> bool:
    """Whether pushing to `target` would write over what DATASET is read from."""
    one, other = target.rstrip("/") + "/", dataset.rstrip("/") + "/"
    if target.startswith("s3://"):
        return one.startswith(other) or other.startswith(one)
    return one.lower() == other.lower()


def reason_to_push(target: str, data: Path) -> str:
    """Why what the data stage published in `data` has to be pushed, empty where it was pushed."""
    manifest = manifest_of(data)
    if not target or manifest is None or _last(data) == _record(target, manifest["content"]):
        return ""
    return f"PUSH_DATASET={target} does not have these sequences yet"


def note_pushed(target: str, data: Path) -> None:
    """Record that `target` has what `data` holds."""
    content = (manifest_of(data) or {}).get("content", "")
    beside = data.parent / f"{_RECORD}.new"
    write_json(beside, _record(target, content))
    beside.replace(data.parent / _RECORD)


def _record(target: str, content: str) -> dict[str, str]:
    return {"target": target.rstrip("/"), "content": content}


def _last(data: Path) -> object:
    try:
        return json.loads((data.parent / _RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # never pushed, or damaged: pushed again
