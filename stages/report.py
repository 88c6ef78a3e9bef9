"""Write outputs/RUN/report.html: one page on what was trained, whether it got better, and its cost.

Reads the manifests, metrics.jsonl and eval's answers of whatever stages there are. The page is one
file that asks nothing of the network.
"""

from __future__ import annotations

from pathlib import Path

from stages.run.cli import stage_command
from stages.run.errors import InputError
from stages.run.settings import Settings


@stage_command(
    "report",
    "MODEL_ID",
    "DATASET",
    publishes=False,
    run="Folder of the run.",
)
def main(settings: Settings, run: Path) -> None:
    from stages.page.facts import facts_of
    from stages.page.render import render

    facts = facts_of(run, settings)
    if not facts.manifests and not facts.steps:
        raise InputError(f"{run} holds no stage's output yet. Run make all first.")
    page, writing = run / "report.html", run / ".report.html"
    writing.write_text(render(facts), encoding="utf-8")
    writing.replace(page)
    print(f"report: {page}", flush=True)


if __name__ == "__main__":
    main()
