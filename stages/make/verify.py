"""`make verify`: is every published file still what its stage published?

    python3 -I -S stages/make/verify.py RUN_FOLDER STAGE ...

Compares every file with its manifest's digest. Prints a line per stage; the exit status is 1 when
anything is damaged. Writes nothing. Standard library only.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stages.run.manifest import file_problems, manifest_of, manifest_problem
from stages.run.progress import show_size

SHOWN = 5


def damage_of(output: Path) -> list[str]:
    """All that is wrong with a published output."""
    while True:
        manifest = manifest_of(output)
        found = (
            [manifest_problem(output)]
            if manifest is None
            else file_problems(manifest, output, read=True)
        )
        if manifest_of(output) == manifest:  # else another make published it meanwhile
            return found


def line_of(output: Path, found: list[str]) -> str:
    """What `make verify` says of one stage."""
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return f"DAMAGED: {'; '.join(found[:SHOWN])}{more}"
    manifest = manifest_of(output) or {"outputs": {}}
    sizes = [facts["bytes"] for facts in manifest["outputs"].values()]
    return f"{len(sizes)} files, {show_size(sum(sizes))}, as published"


def main(run_folder: str, *stages: str) -> int:
    """Look at each stage that has an output; returns the exit status."""
    outputs = [Path(run_folder) / stage for stage in stages]
    there = [output for output in outputs if output.exists() or output.is_symlink()]
    damaged = []
    for output in there:
        found = damage_of(output)
        damaged += [output.name] if found else []
        print(f"{output.name:>18}  {line_of(output, found)}", flush=True)
    if not there:
        print(
            f"{run_folder} holds nothing that a stage published. `make all` makes it.",
            file=sys.stderr,
        )
    if damaged:
        print(
            f"{len(damaged)} of {len(there)} stages damaged. `make all VERIFY=1` makes them again.",
            file=sys.stderr,
        )
    return 1 if damaged or not there else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
