"""PUSH_DATASET and HUB_REPO: where packed sequences and models may be pushed, and where each run's
were pushed last.

Standard library only: make reads them at every start.
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
_LONGEST_HUB_ID = 96  # characters, as huggingface_hub has it
# What was pushed last, by the stage that published it. The records are beside the stages' folders:
# what a stage published stays as it is.
_RECORDS = {"data": ".pushed.json", "consolidate": ".pushed-model.json"}


def check_push_target(text: str) -> None:
    """Raise InputError unless `text` is s3://BUCKET/PREFIX, OWNER/NAME, or empty."""
    if not text or _is_hub_id(text) or _BUCKET.fullmatch(f"{text.rstrip('/')}/"):
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


def check_hub_repo(text: str) -> None:
    """Raise InputError unless `text` is OWNER/NAME, or empty."""
    if not text or _is_hub_id(text):
        return
    shown = "" if "@" in text or "?" in text else f"{text[:60]!r} "  # it may hold a key
    raise InputError(
        f"{shown}is no repository of the Hub. Write OWNER/NAME: letters, digits, dots, - and _, at "
        f"most {_LONGEST_HUB_ID} characters. The token comes from `hf auth login` or HF_TOKEN."
    )


def _is_hub_id(text: str) -> bool:
    right = _HUB_ID.fullmatch(text) and len(text) <= _LONGEST_HUB_ID
    return bool(right and not re.search(r"--|\.\.|\W$", text))


def overwrites(target: str, dataset: str) -> bool:
    """Whether pushing to `target` would write over what DATASET is read from."""
    one, other = target.rstrip("/") + "/", dataset.rstrip("/") + "/"
    if target.startswith("s3://"):
        return one.startswith(other) or other.startswith(one)
    return one.lower() == other.lower()


def reason_to_push(target: str, data: Path) -> str:
    """Why what the data stage published in `data` has to be pushed, empty where it was pushed."""
    manifest = manifest_of(data)
    if not target or manifest is None or was_pushed(target, manifest["content"], data):
        return ""
    return f"PUSH_DATASET={target} does not have these sequences yet"


def was_pushed(target: str, content: str, output: Path) -> bool:
    """Whether `content`, of what a stage published in `output`, was pushed last, to `target`."""
    try:
        last = json.loads(_record_file(output).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False  # never pushed, or damaged: pushed again
    return last == _record(target, content)


def note_pushed(target: str, output: Path, content: str = "") -> None:
    """Record that `target` has `content`; by default, all that `output` holds."""
    file = _record_file(output)
    beside = file.with_name(f"{file.name}.new")
    write_json(beside, _record(target, content or (manifest_of(output) or {}).get("content", "")))
    beside.replace(file)


def _record(target: str, content: str) -> dict[str, str]:
    return {"target": target.rstrip("/"), "content": content}


def _record_file(output: Path) -> Path:
    return output.parent / _RECORDS[output.name]
