"""Which parameters a training trains: said and checked before its first step, on every backend."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from stages.run.errors import StageFailure


def trained_line(parameters: Iterable[tuple[str, torch.nn.Parameter]], lora_r: int) -> str:
    """`trains 4,884,480 of 139,399,488 parameters (3.504%): LoRA of rank 16`.

    Raises StageFailure unless all are trained or, with LoRA, the adapters and nothing else: a
    library that loses the freeze would train the whole model without a word.
    """
    every = list(parameters)
    wrong = [
        name for name, value in every if value.requires_grad != (not lora_r or ".lora_" in name)
    ]
    trained = sum(value.numel() for _, value in every if value.requires_grad)
    if wrong or not trained:
        raise StageFailure(
            f"With LORA_R={lora_r}, {len(wrong)} of {len(every)} parameters are trained that must "
            f"not be, or not trained that must be ({', '.join(wrong[:3])}). Nothing was trained. "
            "This is a fault of this project or of a library: please report it."
        )
    total = sum(value.numel() for _, value in every)
    kind = f"LoRA of rank {lora_r}" if lora_r else "all weights"
    return f"trains {trained:,} of {total:,} parameters ({100 * trained / total:.4g}%): {kind}"
