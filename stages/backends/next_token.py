"""The logits of the token that follows some ids, by transformers itself: whether two answers part
at a tie that rounding decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def near_tie(folder: Path) -> Callable[[list[int], int, int], str]:
    """A function of ids [tokens] and two ids that may follow: their logits as text where they
    differ by at most two steps of the model's dtype, else "". It loads the model in `folder` when
    it is first called, on the CPU."""
    import torch

    from stages.backends.evaluate import load_for_evaluation

    loaded: list[Any] = []

    @torch.inference_mode()
    def compare(ids: list[int], one: int, other: int) -> str:
        if not loaded:
            loaded.append(load_for_evaluation(folder, "auto", torch.device("cpu")))
        [model] = loaded
        logits = model(torch.tensor([ids])).logits[0, -1]
        pair = logits[[one, other]].float()
        # A step is eps x the power of two below the logit: 0.125 at 23 in bfloat16.
        step = torch.finfo(logits.dtype).eps * 2 ** torch.floor(torch.log2(pair.abs().max()))
        first, second = pair.tolist()
        near = abs(first - second) <= 2 * float(step)
        return f"{first:.5g} and {second:.5g} in {str(logits.dtype)[6:]}" if near else ""

    return compare
