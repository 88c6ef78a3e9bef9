"""Serve the page of `make report` on 127.0.0.1:WATCH_PORT while the stages run, until Ctrl-C.

The page updates itself when a step is logged or a stage publishes. Nothing is written.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from stages.run.cli import stage_command
from stages.run.settings import Settings


@stage_command(
    "watch",
    *("MODEL_ID", "DATASET", "WATCH_PORT"),
    publishes=False,
    run="Folder of the run.",
)
def main(settings: Settings, run: Path) -> None:
    from stages.page.serve import HOST, Page, server_of

    os.nice(10)  # the stages come first
    port = settings.watch_port
    with server_of(Page(run, settings), port) as server:
        try:
            print(
                f"watch: http://{HOST}:{port} shows {run} until Ctrl-C. From another machine: "
                f"ssh -L {port}:{HOST}:{port} and this machine's name.",
                flush=True,
            )
            server.serve_forever()
        except KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)  # guard.py need not repeat it
            print("\nwatch: ended", flush=True)


if __name__ == "__main__":
    main()
