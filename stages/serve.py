"""Serve the consolidated model as an OpenAI-compatible API until Ctrl-C.

The server is vLLM, optimum-neuron or `transformers serve`, whichever fits this machine; its command
is printed, and this process becomes it. Nothing is installed.
"""

from __future__ import annotations

from pathlib import Path

from stages.run.backend import backend_module
from stages.run.cli import stage_command
from stages.run.server import start
from stages.run.settings import Settings


@stage_command(
    "serve",
    *("BACKEND", "SERVE_HOST", "SERVE_PORT", "INFERENCE_BATCH_SIZE"),
    *("INFERENCE_SEQUENCE_LENGTH", "INFERENCE_TENSOR_PARALLEL_SIZE"),
    publishes=False,
    consolidate="Folder that consolidate published.",
)
def main(settings: Settings, consolidate: Path) -> None:
    start(backend_module("serve", settings).server(settings, consolidate), settings)


if __name__ == "__main__":
    main()
