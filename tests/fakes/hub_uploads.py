"""What the fake Hub does for those who write to it: repositories, large files, commits.

Only what huggingface_hub asks for when it or `datasets` pushes: large files come first, by the LFS
batch protocol and a PUT each; a commit names them by digest and holds the small ones.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

LARGE = (".parquet", ".safetensors")


def create_repository(root: Path, private: set[str], question: dict[str, Any]) -> str:
    """The path of the new model or dataset below `root`. Raises FileExistsError with it where it
    exists."""
    name = f"{question['organization']}/{question['name']}"
    path = f"{question.get('type', 'model')}s/{name}"
    if (root / path).exists():
        raise FileExistsError(path)
    (root / path).mkdir(parents=True)
    (root / path / ".gitattributes").write_text("*.parquet filter=lfs\n*.safetensors filter=lfs\n")
    if question.get("private"):
        private.add(name)
    return path


def upload_modes(question: dict[str, Any]) -> dict[str, Any]:
    return {
        "files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in question["files"]
        ]
    }


def upload_places(
    address: str, question: dict[str, Any], large: dict[str, bytes]
) -> dict[str, Any]:
    """Where to PUT each large file that is not there yet."""
    return {
        "transfer": "basic",
        "objects": [
            one
            if one["oid"] in large
            else {**one, "actions": {"upload": {"href": f"{address}/lfs/{one['oid']}"}}}
            for one in question["objects"]
        ],
    }


def commit(repository: Path, large: dict[str, bytes], lines: bytes) -> None:
    """Write what a commit adds to the folder `repository`, and remove what it deletes."""
    for line in lines.splitlines():
        step = json.loads(line)
        value = step["value"]
        if step["key"] == "header":
            continue
        path = repository / value["path"]
        if step["key"] == "deletedFile":
            path.unlink()
            continue
        content = (
            large[value["oid"]] if step["key"] == "lfsFile" else base64.b64decode(value["content"])
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def keep(large: dict[str, bytes], oid: str, content: bytes) -> bool:
    """Keep a large file; False where its content has another digest."""
    if hashlib.sha256(content).hexdigest() != oid:
        return False
    large[oid] = content
    return True
