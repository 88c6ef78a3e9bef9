"""Train on the packed sequences with torchrun. Publishes sharded weights and metrics.jsonl.

The same command continues an interrupted training from its last checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from stages.checks import require
from stages.run.backend import backend_module
from stages.run.cli import stage_command
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings


@stage_command(
    "train", data="Folder that data published.", precompile="Folder that precompile published."
)
def main(settings: Settings, data: Path, precompile: Path, output: Path) -> None:
    backend = backend_module("train", settings)

    # Precompile only fills a cache, which makes training start sooner, so it is not an input.
    def build(work: Path) -> StageResult:
        require(settings, "train")
        return backend.train(settings, data, precompile, work)

    publish("train", settings, {"data": data}, output, build, resumable=True)


if __name__ == "__main__":
    main()
