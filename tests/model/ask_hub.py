"""A process that asks a Hub as the stages do, many times: the libraries read its address once, when
they are imported.

A question is a line of JSON on its input, the answer a line on its output. Nobody waits for a
pause: it is noted, and the clock that stages/model/hub.py reads goes forward by it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ALL = ("*.json", "*.safetensors")


@dataclass
class Answer:
    """What was fetched: digests of files by name, or the rows' responses; else the error. `pauses`:
    seconds, `printed`: lines."""

    files: dict[str, str] | None
    rows: list[str] | None
    error: str
    pauses: list[float]
    printed: list[str]
    exit_status: int

    @property
    def fetched(self) -> bool:
        return not self.error


class Asker:
    """The process, seen from the tests. `environment`: HF_HUB_OFFLINE and the like."""

    def __init__(self, endpoint: str, home: Path, **environment: str):
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "AWS_"))
        }
        settings = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_canary",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        settings |= {
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        }
        settings |= {
            "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_HUB_VERBOSITY": "error",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        self.home = home
        command = [sys.executable, "-m", "tests.model.ask_hub"]
        pipe = subprocess.PIPE
        environment = clean | settings | environment
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, env=environment, text=True
        )

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def model(self, name: str, patterns: tuple[str, ...] = ALL, revision: str = "main") -> Answer:
        return self.ask(kind="model", name=name, patterns=patterns, revision=revision)

    def rows(self, name: str, revision: str = "main") -> Answer:
        return self.ask(kind="dataset", name=name, patterns=(), revision=revision)

    def tokenizer(self, name: str) -> Answer:
        return self.ask(kind="tokenizer", name=name, patterns=(), revision="main")

    def push(self, target: str, data: Path) -> Answer:
        return self.ask(kind="push", name=target, patterns=[str(data)], revision="")

    def push_model(self, run: Path, **settings: object) -> Answer:
        """Push the model of a run's folder; `settings` are fields of Settings."""
        return self.ask(kind="push model", name=str(run), patterns=settings, revision="")

    def rights(self, target: str, **settings: object) -> Answer:
        """The doctor's lines about HUB_REPO, as rows."""
        return self.ask(kind="rights", name=target, patterns=settings, revision="")

    def ask(self, **question: object) -> Answer:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        printed = []
        for line in self.process.stdout:
            if line.startswith("{"):
                return Answer(**json.loads(line), printed=printed)
            printed.append(line.rstrip())
        raise AssertionError(
            "\n".join([f"the process that asks the Hub ended at {question}", *printed])
        )


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def main() -> None:
    from stages.doctor import hub_repository
    from stages.model import hub
    from stages.model.push import push as push_model
    from stages.run.errors import InputError, StageFailure
    from stages.run.settings import Settings
    from stages.text.examples import Columns, open_examples
    from stages.text.find_tokenizer import find_tokenizer
    from stages.text.push import push

    pauses: list[float] = []
    really = time.monotonic
    time.sleep = pauses.append  # type: ignore[assignment]
    hub.time = SimpleNamespace(sleep=pauses.append, monotonic=lambda: really() + sum(pauses))  # type: ignore[assignment]
    hub.LONGEST_SILENCE = 2.0
    for line in sys.stdin:
        question = json.loads(line)
        kind, name, revision = question["kind"], question["name"], question["revision"]
        pauses.clear()
        files, rows, error, status = None, None, "", 0
        try:
            if kind == "model":
                files = digests(hub.download_files(name, revision, tuple(question["patterns"])))
            elif kind == "push":
                push(name, Path(question["patterns"][0]))
            elif kind == "push model":
                stages = ("data", "train", "eval", "consolidate")
                push_model(
                    Settings(**question["patterns"]), {one: Path(name, one) for one in stages}
                )
            elif kind == "rights":
                found = hub_repository(Settings(hub_repo=name, **question["patterns"]))
                rows = [f"{result.state} {result.text}" for result in found]
            elif kind == "tokenizer":
                find_tokenizer(name, revision)
            else:
                dataset = open_examples(
                    name, columns=Columns("instruction", "context", "response"), revision=revision
                )
                rows = [row.messages[-1].content for batch in dataset.batches for row in batch]
        except (InputError, StageFailure) as refused:
            error, status = str(refused), refused.exit_status
        print(
            json.dumps(
                {
                    "files": files,
                    "rows": rows,
                    "error": error,
                    "pauses": pauses,
                    "exit_status": status,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
