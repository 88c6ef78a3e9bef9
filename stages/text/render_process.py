"""The process that renders conversations with a chat template (render), as its parent has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from stages.run.errors import InputError

# Seconds of a CPU for one conversation, and bytes beyond what Python and transformers take.
MOST_SECONDS, MOST_BYTES = 30, 2**30
OTHER_TEMPLATE = "Name another one in CHAT_TEMPLATE, or set PROMPT_FORMAT=dolly."
# The last is guard's mark, by which it ends what its stage leaves behind.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "HOME", "TRN_TUNE_STAGE")
_ROOT = Path(__file__).resolve().parents[2]


class RenderProcess:
    """The process that renders; started when it is first asked."""

    def __init__(self, template: str, tokens: dict[str, str]):
        self._first = {"template": template, "tokens": tokens}
        self._process: subprocess.Popen[str] | None = None
        self._one_at_a_time = Lock()
        self.dates: dict[str, str] = {}

    def ask(self, conversations: list[Any], ask: bool, alone: bool) -> list[Any]:
        """The answer of `render` to a request; raises InputError where it ends without one."""
        with self._one_at_a_time:
            try:
                self.start()
                answer = self._send({"conversations": conversations, "ask": ask, "alone": alone})
            except (BrokenPipeError, ValueError):
                raise InputError(self._why_it_ended()) from None
        self.dates = answer["dates"]
        return list(answer["conversations"])

    def close(self) -> int:
        """End the process; its exit status."""
        if self._process is None:
            return 0
        assert self._process.stdin and self._process.stdout
        with suppress(OSError):
            self._process.stdin.close()
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._process.stdout.close()
        self._process = None
        return status

    def start(self) -> None:
        """Start the process, if it is not there yet; it takes a second or two."""
        if self._process is not None:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stages.text.render", str(MOST_SECONDS), str(MOST_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            cwd=_ROOT,
            start_new_session=True,  # Ctrl-C in a terminal is for the stage
            # A template needs no secret of this process.
            env={
                **{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                # transformers would import torch, which takes seconds, or say that it is missing.
                "USE_TORCH": "0",
                "TRANSFORMERS_VERBOSITY": "error",
            },
        )
        assert self._process.stdin
        self._process.stdin.write(json.dumps(self._first) + "\n")

    def _send(self, request: dict[str, Any]) -> Any:
        assert self._process and self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def _why_it_ended(self) -> str:
        status = self.close()
        return (
            f"the chat template was stopped (status {status}): it may take {MOST_SECONDS} s and "
            f"{MOST_BYTES // 2**20:,} MiB for one conversation. {OTHER_TEMPLATE}"
        )
