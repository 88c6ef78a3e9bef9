"""Run the training command for a few steps, to fill the compile cache and to estimate what training
takes."""

from __future__ import annotations

from pathlib import Path

from stages.checks import require
from stages.run.backend import backend_module
from stages.run.cli import stage_command
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings


@stage_command("precompile", data="Folder that data published.")
def main(settings: Settings, data: Path, output: Path) -> None:
    backend = backend_module("precompile", settings)

    # Only shapes decide what is compiled, so other data does not make this stage stale.
    def build(work: Path) -> StageResult:
        require(settings, "precompile")
        return backend.precompile(settings, data, work)

    publish("precompile", settings, {}, output, build)


if __name__ == "__main__":
    main()
