"""What the tests of the doctor's checks share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from stages.run.check_result import CheckResult
from stages.run.settings import Settings


def only(findings: object) -> CheckResult:
    (finding,) = findings  # type: ignore[misc]
    return finding


def llama_7b(folder: Path) -> Settings:
    (folder / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": '
        '11008, "num_hidden_layers": 32,'
        ' "num_attention_heads": 32}'
    )
    return Settings(model_id=str(folder), backend="neuron")


def as_an_ordinary_user(check: Callable[[], bool]) -> bool:
    """What `check` returns in a process without root's right to everything."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            status = 0 if check() else 1
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 1)
    return status == 0
