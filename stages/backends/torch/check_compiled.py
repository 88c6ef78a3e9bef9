"""Compares the logits of a compiled model with those of the eager model it was compiled from.

Both read the same random ids: prompts of every length up to CHECKED_TOKENS, each followed by
CHECKED_STEPS decode steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.backends.torch.generate import CompiledModel, load
from stages.run.errors import StageFailure

CHECKED_TOKENS, CHECKED_STEPS = 512, 4
# The largest allowed difference, as a fraction of the largest logit: the same sums in another
# order. In bfloat16 (8 bits of precision) a sum rounds by 0.4% and a few dozen layers add up;
# float16 has 11 bits, float32 24.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Probe:
    """What both models read: one sequence per slot.

    `sequences` are ids [batch, longest prompt + CHECKED_STEPS], `lengths` each slot's prompt length
    in tokens.
    """

    sequences: torch.Tensor
    lengths: list[int]


def random_probe(*, vocab_size: int, batch_size: int, sequence_length: int) -> Probe:
    """Seeded random ids; the slots' prompts range from the longest that is checked to one token."""
    longest = min(sequence_length, CHECKED_TOKENS) - CHECKED_STEPS
    lengths = [int(length) for length in torch.linspace(longest, 1, batch_size)]
    shape = (batch_size, longest + CHECKED_STEPS)
    return Probe(
        torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)), lengths
    )


@torch.inference_mode()
def eager_logits(model: Any, probe: Probe) -> torch.Tensor:
    """float32 logits [CHECKED_STEPS + 1, batch, vocab] of the eager model, on the CPU.

    They follow each slot's prompt and each of its CHECKED_STEPS tokens. Each sequence is read whole
    and by itself, without cache or padding.
    """
    slots = []
    for sequence, length in zip(probe.sequences, probe.lengths, strict=True):
        ids = sequence[None, : length + CHECKED_STEPS].to(model.device)
        slots.append(
            model(ids, use_cache=False, logits_to_keep=CHECKED_STEPS + 1).logits[0].float().cpu()
        )
    return torch.stack(slots, dim=1)


def check_compiled(compiled: Path, probe: Probe, expected: torch.Tensor) -> dict[str, Any]:
    """Compare the model in `compiled` with the eager model's logits, `expected`.

    Returns the differences, for the manifest; raises StageFailure where they are too large. A
    float32 model must also choose the same greedy id everywhere. With fewer bits two ids can be
    equally likely and rounding decides, so the agreement is only reported.
    """
    model = load(compiled)
    logits = _compiled_logits(model, probe)
    difference, largest = (logits - expected).abs().max().item(), expected.abs().max().item()
    equal = int((logits.argmax(-1) == expected.argmax(-1)).sum())
    compared = expected[..., 0].numel()
    allowed = TOLERANCE[model.dtype] * largest
    # Written so that a difference of NaN fails as well.
    if not difference <= allowed or (model.dtype == torch.float32 and equal < compared):
        raise StageFailure(
            "The compiled model differs from the eager one: largest difference of a logit "
            f"{difference:.3g}, allowed {allowed:.3g} ({TOLERANCE[model.dtype]:g} of the largest "
            f"logit, {largest:.3g}); {equal} of {compared} greedy ids are equal. Nothing was "
            "published. Try again with an empty TORCHINDUCTOR_CACHE_DIR; if the difference stays, "
            "it is a bug in this torch version."
        )
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_logits_difference": difference,
        "largest_logit": largest,
        "greedy_ids_equal": equal,
        "greedy_ids_compared": compared,
    }


def _compiled_logits(model: CompiledModel, probe: Probe) -> torch.Tensor:
    """float32 logits [CHECKED_STEPS + 1, batch, vocab] of the compiled model, on the CPU."""
    cache = model.new_cache()
    prompts = [
        sequence[:length].tolist()
        for sequence, length in zip(probe.sequences, probe.lengths, strict=True)
    ]
    logits, positions = model.prefill(prompts, cache)
    steps = [logits]
    lengths = torch.tensor(probe.lengths).unsqueeze(1)
    for step in range(CHECKED_STEPS):
        ids = probe.sequences.gather(1, lengths + step).squeeze(1).to(model.device)
        steps.append(model.decode_one_token(ids, positions + step, cache))
    return torch.stack(steps).float().cpu()
