"""`make history`: the earlier results of a run; `make compare`: runs side by side.

    python3 -I -S stages/make/history.py RUN_FOLDER STAGE ...
    python3 -I -S stages/make/history.py --compare STAGE ...      (RUNS names the runs)

Both read manifests alone, and write nothing. Standard library only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stages.make.results import dollars, facts, finished, outcome, published, took
from stages.run.layout import HISTORY_FOLDER
from stages.run.manifest import manifest_in, manifest_of
from stages.run.provenance import differences

OUTPUTS = Path("outputs")
WIDTH = 30  # of a column; longer values are cut


def history(run: Path, stages: list[str]) -> list[str]:
    """A line per result of each stage, the oldest first, and what was changed for it."""
    lines = []
    for stage in stages:
        results = [*_replaced(run, stage), *filter(None, [manifest_of(run / stage)])]
        for number, manifest in enumerate(results):
            lines.append(f"{stage if number == 0 else '':>18}  {facts(manifest)}")
            if number:
                changed = differences(results[number - 1]["provenance"], manifest["provenance"])
                because = "; ".join(changed) or "made again without a change"
                lines.append(f"{'':>18}    after: {because}")
            lines += [
                f"{'':>18}    adopted {one['at'][:16].replace('T', ' ')} in spite of: "
                f"{'; '.join(map(str, one['in_spite_of']))}"
                for one in manifest.get("adopted", [])
            ]
    return lines or [f"{run}: nothing was published yet"]


def compare(runs: list[Path], stages: list[str]) -> list[str]:
    """The settings in which the runs differ, and the results of each stage, in columns."""
    made = [published(run, stages) for run in runs]
    settings = [_settings(manifests) for manifests in made]
    names = sorted(set().union(*settings))
    width = max([18, *map(len, names)])
    lines = [_row("", [run.name for run in runs], width)]
    for name in names:
        values = [str(one.get(name, "not recorded")) for one in settings]
        if len(set(values)) > 1:
            lines.append(_row(name, values, width))
    if len(lines) == 1:
        lines.append("no setting differs")
    for stage in stages:
        of_stage = [manifests.get(stage, {}) for manifests in made]
        if any(of_stage):
            lines.append("")
            lines.append(_row(stage, [finished(one) for one in of_stage], width))
            for cells in ([took(one) for one in of_stage], [dollars(one) for one in of_stage]):
                lines += [_row("", cells, width)] if any(cells) else []
            for part in range(max(len(outcome(one).split(", ")) for one in of_stage)):
                cells = [[*outcome(one).split(", "), *[""] * part][part] for one in of_stage]
                lines += [_row("", cells, width)] if any(cells) else []
    return lines


def _replaced(run: Path, stage: str) -> list[dict[str, Any]]:
    """The manifests of a stage's former outputs that can be read, the oldest first."""
    found = []
    for file in (run / HISTORY_FOLDER / stage).glob("*.json"):
        manifest = manifest_in(file)
        if manifest is None:
            print(f"note: {file} is damaged, and left out", file=sys.stderr)
        else:
            found.append(((str(manifest.get("finished")), file.stat().st_mtime_ns), manifest))
    return [manifest for _, manifest in sorted(found, key=lambda one: one[0])]


def _settings(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings of a run's stages; a file is named by the beginning of its digest."""
    return {
        name: str(value)[:15] if str(value).startswith("sha256:") else value
        for manifest in manifests.values()
        for name, value in manifest["provenance"]["settings"].items()
    }


def _row(name: str, cells: list[str], width: int) -> str:
    shown = [cell if len(cell) <= WIDTH else f"{cell[: WIDTH - 3]}..." for cell in cells]
    return f"{name:>{width}}  {'  '.join(f'{cell:<{WIDTH}}' for cell in shown)}".rstrip()


def main(*words: str) -> None:
    if words[0] != "--compare":
        print("\n".join(history(Path(words[0]), list(words[1:]))))
        return
    names = os.environ.get("RUNS", "").split()
    runs = [OUTPUTS / name for name in names]
    problems = [
        f"{run}: no stage has published there."
        for run in runs
        if run.parent != OUTPUTS or not published(run, words[1:])
    ]
    if len(names) < 2:
        problems = [f"RUNS={' '.join(names)!r} names {len(names)}. Name two runs or more."]
    if problems:
        print("\n".join(f"error: {one}" for one in problems), file=sys.stderr)
        sys.exit(2)
    print("\n".join(compare(runs, list(words[1:]))))


if __name__ == "__main__":
    main(*sys.argv[1:])
