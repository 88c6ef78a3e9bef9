"""Do a base model and the rows that it is to be trained on belong together?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stages.run.settings import Settings


def fit_problems(settings: Settings, config: Any, vocabulary: int) -> Iterator[str]:
    """A message for each thing in the rows that the model of `config` cannot take.

    `vocabulary` is the number of ids that the rows' tokenizer can give.
    """
    if vocabulary > config.vocab_size:
        yield (
            f"MODEL_ID={settings.model_id}: the tokenizer gives ids up to {vocabulary - 1}, the model has {config.vocab_size} embeddings. "
            f"They do not belong together."
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest and settings.max_length > longest:
        yield f"MAX_LENGTH={settings.max_length} is above the model's {longest} positions. Lower MAX_LENGTH."
