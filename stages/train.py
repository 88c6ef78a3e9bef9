"""Train on the packed sequences with torchrun. Publishes sharded weights and metrics.jsonl.

The same command continues an interrupted training from its last checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from stages.checks import require
from stages.forecast.planned import planned
from stages.run.backend import backend_module
from stages.run.cli import stage_command
from stages.run.layout import STOP_FILE
from stages.run.limits import SPENT_FILE, limited, require_within, spent
from stages.run.manifest import manifest_of
from stages.run.provenance import reasons
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings
from stages.track.follow import TRACKER_FILE, followed


@stage_command(
    "train", data="Folder that data published.", precompile="Folder that precompile published."
)
def main(settings: Settings, data: Path, precompile: Path, output: Path) -> None:
    backend = backend_module("train", settings)

    # Precompile only fills a cache, which makes training start sooner, so it is not an input.
    def build(work: Path) -> StageResult:
        require(settings, "train")
        before = spent(work, output.parent)
        if settings.budget or settings.deadline:
            expected = planned("train", settings, output.parent)["seconds"]
            left = None if expected is None else max(0.0, expected - before.training)
            require_within(settings, before, left)
        if settings.rehearse:
            from stages.rehearse import rehearse

            rehearse(settings, data)
        with followed(settings, work, output.parent), limited(settings, work, output.parent):
            result: StageResult = backend.train(settings, data, precompile, work)
        for name in (SPENT_FILE, STOP_FILE):
            (work / name).unlink(missing_ok=True)
        result.earlier_seconds = before.training
        result.unkeyed += (TRACKER_FILE,)  # where the metrics went is no part of the weights
        return result

    publish(
        "train",
        settings,
        {"data": data},
        output,
        build,
        resumable=True,
        needed=lambda: shards_needed(settings, output),
    )


def shards_needed(settings: Settings, output: Path) -> str:
    """Why shards that KEEP_SHARDS=0 removed have to be trained again; empty if they have not."""
    removed = (manifest_of(output) or {}).get("removed")
    consolidated = output.with_name("consolidate")
    if not removed or not reasons("consolidate", settings, {"train": output}, consolidated):
        return ""
    return f"{removed}, which consolidate needs"


if __name__ == "__main__":
    main()
