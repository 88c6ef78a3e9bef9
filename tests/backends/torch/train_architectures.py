"""One rank of the trainings of test_architectures.py: all in one process, which imports once."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from stages.backends.torch.rank import run_rank
from stages.backends.torch.worker import train
from stages.run.settings import Settings


def main(folder: str) -> None:
    """`folder` has jobs.json: name -> [base model, settings]. Each is trained into its name."""
    root = Path(folder)
    jobs = json.loads((root / "jobs.json").read_text())

    def work(device: torch.device) -> None:
        for name, (base, changes) in jobs.items():
            settings = replace(Settings.read(), **changes)
            train(settings, root / base, root / "data", root / name, -1, device)
            if settings.save_steps:  # once more, from the checkpoint
                resumed = root / f"{name} resumed"
                if dist.get_rank() == 0:
                    shutil.copytree(root / name / "checkpoints", resumed / "checkpoints")
                    shutil.copy(root / name / "metrics.jsonl", resumed)
                dist.barrier()
                train(settings, root / base, root / "data", resumed, -1, device)

    run_rank(work, root / "error")


if __name__ == "__main__":
    main(*sys.argv[1:])
