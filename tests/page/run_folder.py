"""A run folder as the stages leave one, without running them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.run.manifest import with_checksum

DATA = {
    "columns": "instruction in 'question', response in 'answer'",
    "prompt_format": "text",
    "max_length": 64,
    "rows_in": 100,
    "empty": 0,
    "duplicate": 0,
    "tokens_in": 4000,
    "over_long": 0,
    "dropped": 0,
    "cut_tokens": 0,
    "dropped_tokens": 0,
    "train": {"documents": 90, "packed": 3600, "supervised": 2000, "rows": 60, "padded": 240},
    "validation": {"documents": 10, "packed": 400, "supervised": 200, "rows": 7, "padded": 48},
}
EVAL = {
    "base": {"loss": 3.0, "perplexity": 20.0855},
    "fine_tuned": {"loss": 2.0, "perplexity": 7.3891},
    "comparison": {
        "set": "held-out",
        "questions": 2,
        "judged": 2,
        "base": {"ended": 0, "exact_matches": 0},
        "fine_tuned": {"ended": 2, "exact_matches": 1},
    },
}


def publish(
    run: Path,
    stage: str,
    metrics: dict[str, Any],
    settings: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    **more: Any,
) -> None:
    """Write a manifest that `manifest_of` takes for a stage's."""
    (run / stage).mkdir(parents=True, exist_ok=True)
    manifest = {
        "stage": stage,
        "content": f"{stage:x<64}",
        "metrics": metrics,
        "seconds": 60.0,
        "usd": None,
        "instance": None,
        "device": "cpu",
        "finished": "2026-11-28T14:51:08Z",
        "versions": {"python": "3.11.7"},
        "provenance": {
            "settings": settings or {},
            "versions": {},
            "code": {},
            "inputs": inputs or {},
        },
        "outputs": {},
        "seen": {"backend": "torch", "code": {}, "files": {}},
        **more,
    }
    (run / stage / "manifest.json").write_text(json.dumps(with_checksum(manifest)))


def log_steps(folder: Path, losses: list[float], validation: dict[int, float]) -> None:
    """metrics.jsonl with a line per loss; `validation`: step -> validation loss."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "step": step,
            "epoch": step / 10,
            "loss": loss,
            "learning_rate": 1e-4,
            "grad_norm": 1.5,
            "tokens_per_second": 1000.0,
            **({"validation_loss": validation[step]} if step in validation else {}),
        }
        for step, loss in enumerate(losses, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def compare(run: Path, *questions: tuple[str, str, str, str]) -> None:
    """comparison.jsonl: question, expected answer, base's, fine-tuned one's."""
    (run / "eval").mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "instruction": question,
            "context": "",
            "expected": expected,
            "base": {"answer": base, "tokens": 4, "ended": False, "log_probability": -1.0},
            "fine_tuned": {"answer": tuned, "tokens": 4, "ended": True, "log_probability": -1.0},
        }
        for question, expected, base, tuned in questions
    ]
    (run / "eval" / "comparison.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
