"""Answering prompts step by step with a compiled model whose batch and length are fixed, whatever compiled it.

A backend's model says how to prefill and to decode one token; here are the loop, the ends of answers, the choice of each token
and the refusal of prompts that do not fit. Needs torch alone, so that a first answer comes at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from stages.run.errors import InputError


class Decoder(ABC):
    """A compiled model in memory. Its sizes are fixed: `batch_size` prompts, `sequence_length` tokens of prompt and answer.

    `vocab_size` is the number of ids that it knows, `device` the place of its logits: "cpu" or "cuda".
    """

    batch_size: int
    sequence_length: int
    vocab_size: int
    device: str

    @abstractmethod
    def new_cache(self) -> Any:
        """An empty KV cache for `prefill`."""

    @abstractmethod
    def prefill(self, prompts: list[list[int]], cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the prompts into an empty cache; the logits of what follows each [batch, vocab], and its position [batch].

        Rows without a prompt come behind the others; nobody looks at them.
        """

    @abstractmethod
    def decode_one_token(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Read one token per row, ids [batch] at positions [batch]; the logits of what follows it [batch, vocab]."""

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        do_sample: bool,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        eos_token_id: int,
    ) -> Iterator[list[int | None]]:
        """Yield, step by step, one new id per prompt; None for a prompt that has ended.

        A prompt ends at `eos_token_id`, which is not yielded, or when prompt and answer fill the compiled length. All end
        after `max_new_tokens`. Sampling depends on `seed`, the logits and the row alone. Raises InputError at once when
        the prompts do not fit: too many, too long, empty, or ids outside the vocabulary.
        """
        if problems := list(self._unfit(prompts)):
            raise InputError(problems)
        generator = torch.Generator(self.device).manual_seed(seed)

        def choose(logits: torch.Tensor) -> torch.Tensor:
            if not do_sample:
                return logits.argmax(-1)
            return sample(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )

        return self._answers(prompts, max_new_tokens, choose, eos_token_id)

    def _answers(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        choose: Callable[[torch.Tensor], torch.Tensor],
        eos_token_id: int,
    ) -> Iterator[list[int | None]]:
        cache, going = self.new_cache(), set(range(len(prompts)))
        logits, positions = self.prefill(prompts, cache)
        for answered in range(1, max_new_tokens + 1):
            ids = choose(logits)
            chosen = ids.tolist()
            going -= {row for row in going if chosen[row] == eos_token_id}
            if not going:
                return
            yield [chosen[row] if row in going else None for row in range(len(prompts))]
            going -= {row for row in going if len(prompts[row]) + answered >= self.sequence_length}
            if not going or answered == max_new_tokens:
                return
            logits = self.decode_one_token(ids, positions, cache)
            # Rows that have ended, and rows without a prompt, go on beside the others: they must not leave the cache.
            positions = (positions + 1).clamp(max=self.sequence_length - 1)

    def _unfit(self, prompts: list[list[int]]) -> Iterator[str]:
        if not 1 <= len(prompts) <= self.batch_size:
            yield f"{len(prompts)} prompts for a model compiled for 1 to {self.batch_size} at a time: raise INFERENCE_BATCH_SIZE"
        for number, prompt in enumerate(prompts, start=1):
            which = f"prompt {number} of {len(prompts)}"
            if not prompt:
                yield f"{which} has no tokens: give at least one"
            elif len(prompt) >= self.sequence_length:
                yield (
                    f"{which} has {len(prompt)} tokens, the model was compiled for prompts of at most {self.sequence_length - 1} "
                    f"(INFERENCE_SEQUENCE_LENGTH {self.sequence_length}, prompt and answer together): shorten it or compile for more"
                )
            elif min(prompt) < 0 or max(prompt) >= self.vocab_size:
                yield (
                    f"{which} has ids from {min(prompt)} to {max(prompt)}, the model knows 0 to {self.vocab_size - 1}: "
                    "tokenise it with the model's own tokenizer"
                )


def right_padded(
    prompts: list[list[int]], *, rows: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as ids [rows, length], zeros behind each, and their lengths [rows]; a row without a prompt counts as one token."""
    ids, lengths = torch.zeros(rows, length, dtype=torch.int64), torch.ones(rows, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], lengths[row] = torch.tensor(prompt), len(prompt)
    return ids, lengths


def with_empty_rows(logits: torch.Tensor, rows: int) -> torch.Tensor:
    """logits [prompts, vocab] with zeros for the rows that have no prompt [rows, vocab]."""
    return F.pad(logits, (0, 0, 0, rows - len(logits)))


def sample(
    logits: torch.Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Draw an id per row of logits [batch, vocab]: the `top_k` likeliest, then the fewest of them that hold `top_p`.

    top_k=0 and top_p=1.0 leave everything in. top_p is nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751); as in
    transformers it comes after temperature and top_k. temperature and top_p are above 0, so the likeliest id always stays.
    """
    size = logits.shape[-1]
    likeliest, ids = torch.topk(
        logits.float() / temperature, min(top_k, size) if top_k else size, sorted=True
    )
    probabilities = likeliest.softmax(-1)
    if top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities  # 0 for the likeliest
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)
