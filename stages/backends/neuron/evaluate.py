"""Loss of the base and of the fine-tuned model on the held-out rows, on the host's CPU.

optimum-neuron's trainer refuses to evaluate, and a compiled model gives no logits but the last token's. The CPU takes seconds a
row for 7B parameters: EVAL_MAX_DOCUMENTS bounds it.
"""

from __future__ import annotations

from stages.backends.evaluate import validation_losses

__all__ = ["validation_losses"]
