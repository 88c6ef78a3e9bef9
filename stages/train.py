"""Train on the packed rows with torchrun. Publishes sharded weights and metrics.jsonl.

A training that was interrupted continues from its last checkpoint when the same command is given
again.
"""

from __future__ import annotations

from pathlib import Path

from stages.run.backend import backend_module
from stages.run.cli import stage_command
from stages.run.publish import publish
from stages.run.settings import Settings


@stage_command(
    "train", data="Folder that data published.", precompile="Folder that precompile published."
)
def main(settings: Settings, data: Path, precompile: Path, output: Path) -> None:
    backend = backend_module("train", settings)
    # What precompile cached makes training start sooner, and nothing else of it: it is no input.
    publish(
        "train",
        settings,
        {"data": data},
        output,
        lambda work: backend.train(settings, data, precompile, work),
        resumable=True,
    )


if __name__ == "__main__":
    main()
