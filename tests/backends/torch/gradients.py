"""One rank of a backward pass: prints the parameters that got no gradient. Started by torchrun from
a test."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor.parallel import loss_parallel

from stages.backends.batches import PackedSequences
from stages.backends.loss import loss_sum
from stages.backends.torch.parallel import build_model, mesh_of
from stages.backends.torch.rank import run_rank
from stages.run.settings import Settings


def main(base: str, data: str, error_file: str) -> None:
    settings = Settings.read()

    def backward(device: torch.device) -> None:
        model = build_model(Path(base), settings, mesh_of(settings, device), device)
        with loss_parallel():
            batch = PackedSequences(Path(data) / "train").batch(np.array([0]), device)
            alone = settings.tensor_parallel_size == 1
            loss_sum(model, batch, only_supervised=alone).backward()
        missing = [
            name
            for name, p in model.named_parameters()
            if p.grad is None or not p.grad.full_tensor().any()
        ]
        if dist.get_rank() == 0:
            print("without gradient:", missing)

    run_rank(backward, Path(error_file))


if __name__ == "__main__":
    main(*sys.argv[1:])
