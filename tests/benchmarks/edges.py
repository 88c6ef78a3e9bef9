"""Trainings in less memory than `make plan` says that they fit, on this machine's CPU.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/edges.py WORK_FOLDER > table.md

Needs root and Linux's memory controller (cgroup v1), without swap: it limits torchrun and all of
its ranks together, and the kernel kills a rank that goes beyond. A wrong "fits" is a training that
is killed at the first limit.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from stages.forecast.fits import in_all, need_of
from stages.forecast.machine import place_of
from tests.benchmarks.forecasts import HELD_OUT, RUNS, label_of, settings_of, shape, trained

GROUP = Path("/sys/fs/cgroup/memory/trn-tune-edge")
# Of what is planned. 1 / EDGE, 1.19, is the least memory that is said to fit.
LIMITS = (1.14, 1.0, 0.9, 0.8)


def end_of(name: str, changes: dict[str, object], work: Path, limit: int) -> str:
    """How the training ends in `limit` bytes: "trained", "killed" for want of memory, "failed"."""
    (GROUP / "memory.limit_in_bytes").write_text(str(limit))
    under = ("sh", "-c", f'echo $$ > {GROUP}/cgroup.procs; exec "$@"', "sh")
    before = kills()
    if trained(name, settings_of(changes), work, work / "edge", under).returncode == 0:
        return "trained"
    return "killed" if kills() > before else "failed"


def kills() -> int:
    """Processes that the kernel has killed because the group's memory ran out."""
    (line,) = (
        line
        for line in (GROUP / "memory.oom_control").read_text().splitlines()
        if line.startswith("oom_kill ")
    )
    return int(line.split()[1])


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--every", default=7, show_default=True, help="Take each run of this number.")
def main(work: Path, every: int) -> None:
    GROUP.mkdir(exist_ok=True)
    print("| Run | Planned | " + " | ".join(f"in {limit:.2f} of it" for limit in LIMITS) + " |")
    print("|---|---|" + "---|" * len(LIMITS))
    for name, changes in [*RUNS, *HELD_OUT][::every]:
        settings = settings_of(changes)
        place = place_of(settings)
        planned = in_all(need_of(shape(name), settings, place).bytes, settings, place)
        ends = []
        for limit in LIMITS:
            ends.append(end_of(name, changes, work.absolute(), int(limit * planned)))
            if ends[-1] != "trained":
                break
        ends += ["not tried"] * (len(LIMITS) - len(ends))
        cells = " | ".join([label_of(name, changes), f"{planned / 1e6:,.0f} MB", *ends])
        print(f"| {cells} |", flush=True)
    os.rmdir(GROUP)


if __name__ == "__main__":
    main()
