"""Compile the model for generation at a fixed batch and length, and check its logits against the
uncompiled model."""

from __future__ import annotations

import shutil
from pathlib import Path

from stages.run.backend import backend_module
from stages.run.cli import stage_command
from stages.run.digests import files_below
from stages.run.layout import PROMPT_FILE, TOKENIZER_FILES
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings


@stage_command("compile-inference", consolidate="Folder that consolidate published.")
def main(settings: Settings, consolidate: Path, output: Path) -> None:
    publish(
        "compile-inference",
        settings,
        {"consolidate": consolidate},
        output,
        lambda work: compile_folder(settings, consolidate, work),
    )


def compile_folder(settings: Settings, model: Path, work: Path) -> StageResult:
    """Compile the model folder into `work`, and copy its tokenizer and prompt template."""
    backend = backend_module("compile_inference", settings)
    metrics = backend.compile_model(model, work, settings=settings)
    for file in files_below(model, (*TOKENIZER_FILES, PROMPT_FILE)):
        shutil.copyfile(file, work / file.name)
    return StageResult(device=metrics["device"], metrics=metrics)


if __name__ == "__main__":
    main()
