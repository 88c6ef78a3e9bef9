"""Secrets of no use in a run's environment, and where they are looked for: files, what is printed,
command lines.

`watched` runs a program with them; the run that all tests share (`built_once`) is made so.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from threading import Event, Thread

NAMES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "WANDB_API_KEY",
)
# Drawn again in each test run, whose processes share them: a file of the project cannot hold them.
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID") or token_hex(16)
CANARIES = {
    name: f"canary{hashlib.sha256(f'{_RUN} {name}'.encode()).hexdigest()[:32]}" for name in NAMES
}
UMASK = 0o027  # neither the usual one nor tempfile's


def forms(canary: str) -> list[bytes]:
    """How a secret may are in a file: plain, in hexadecimal, and what base64 makes of it at each
    of three offsets."""
    text = canary.encode()
    encoded = [base64.b64encode(b"-" * before + text)[4 * (before > 0) : -4] for before in range(3)]
    return [text, text.hex().encode(), *encoded]


def held(content: bytes) -> list[str]:
    """The names of the secrets that `content` holds in one form or another."""
    return [
        name for name, canary in CANARIES.items() if any(form in content for form in forms(canary))
    ]


def holding(folder: Path) -> tuple[dict[str, list[str]], int]:
    """The files below `folder`, and the members of archives among them, that hold secrets, by name;
    and how many were read."""
    found, read = {}, 0
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file() or "tests" in path.relative_to(folder).parts:
            continue
        for content in (str(path.name).encode(), *_contents(path)):
            read += 1
            if names := held(content):
                found[str(path.relative_to(folder))] = names
    return found, read


def _contents(path: Path) -> Iterator[bytes]:
    content = path.read_bytes()
    yield content
    if content.startswith(b"\x1f\x8b"):
        yield gzip.decompress(content)
    if zipfile.is_zipfile(path):  # a compiled model is one
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())


class CommandLines:
    """Within it, every process's command line is looked at again and again; `found` has those that
    held a secret.

    A command line is what every user of a machine can read of another's process.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self.looks = 0
        self._ended = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CommandLines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.looks += 1
            for process in filter(str.isdecimal, os.listdir("/proc")):
                try:
                    with open(f"/proc/{process}/cmdline", "rb", buffering=0) as file:
                        line = file.read()
                except OSError:
                    continue  # it has ended
                if b"canary" in line and held(line):
                    self.found.append(line.replace(b"\0", b" ").decode(errors="replace"))


def watched(
    words: list[str], folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `words` in `folder` with the canaries, UMASK, and a HOME and a TMPDIR next to the folder;
    what was seen is written there."""
    beside = folder.parent
    for name in ("home", "tmp"):
        (beside / name).mkdir(exist_ok=True)
    own = {"HOME": str(beside / "home"), "TMPDIR": str(beside / "tmp"), **CANARIES}
    environment = {
        name: value
        for name, value in environment.items()
        if name not in ("HF_HOME", "XDG_CACHE_HOME")
    } | own
    with CommandLines() as lines:
        done = subprocess.run(
            words, cwd=folder, env=environment, umask=UMASK, capture_output=True, text=True
        )
    seen = {
        "words": words,
        "printed": done.stdout + done.stderr,
        "command_lines": lines.found,
        "looks": lines.looks,
    }
    with (beside / "seen.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(seen | {"at": time.time()}) + "\n")
    return done
