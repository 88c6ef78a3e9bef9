"""Answers prompts token by token with a compiled model, whose batch size and length are fixed.

A backend's model implements prefill and the decoding of one token. This module has the loop, the
ends of answers, the choice of each token, and the check that the prompts fit. It imports only
torch, so that the first answer comes without delay.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from stages.run.contract import Generation
from stages.run.errors import InputError


class Decoder(ABC):
    """A compiled model in memory, with `batch_size` slots: each takes one prompt at a time.

    `sequence_length` is the length of a slot in tokens, prompt and answer together. `vocab_size` is
    the number of ids that the model knows, `device` is where its logits are: "cpu" or "cuda".
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
        """Read the prompts into an empty cache, one per slot.

        Returns the logits of the token that follows each prompt [batch, vocab] and that token's
        position [batch]. Slots without a prompt come last; their logits are ignored.
        """

    @abstractmethod
    def decode_one_token(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Read one token per slot, ids [batch] at positions [batch].

        Returns the logits of the token that follows each [batch, vocab].
        """

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
        number: int = 0,
    ) -> Generation:
        """Yield, step by step, one new id per prompt; None for a prompt that has ended.

        A prompt ends at `eos_token_id`, which is not yielded, or when prompt and answer fill the
        slot. All prompts end after `max_new_tokens`. Each prompt is sampled with random numbers of
        its own, from `seed` and its number (`number` is that of the first): the prompts beside it
        change nothing, and the same prompt asked twice gets two samples. Raises InputError at once
        when the prompts do not fit: too many, too long, empty, or ids outside the vocabulary.
        """
        if problems := list(self._prompt_problems(prompts)):
            raise InputError(problems)
        generators = [
            torch.Generator(self.device).manual_seed(seed_of(seed, number + slot))
            for slot in range(self.batch_size)
        ]

        def choose(logits: torch.Tensor) -> torch.Tensor:
            if not do_sample:
                return logits.argmax(-1)
            return sample(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, generators=generators
            )

        log_probabilities = [0.0] * len(prompts)
        return Generation(
            self._answers(prompts, max_new_tokens, choose, eos_token_id, log_probabilities),
            log_probabilities,
        )

    def _answers(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        choose: Callable[[torch.Tensor], torch.Tensor],
        eos_token_id: int,
        log_probabilities: list[float],
    ) -> Iterator[list[int | None]]:
        """Adds those of each step to `log_probabilities` before it yields the step."""
        cache, active = self.new_cache(), set(range(len(prompts)))
        logits, positions = self.prefill(prompts, cache)
        for length in range(1, max_new_tokens + 1):  # of the answers, in tokens
            ids = choose(logits)
            new_ids, added = ids.tolist(), log_probability(logits, ids).tolist()
            for slot in active:
                log_probabilities[slot] += added[slot]
            active -= {slot for slot in active if new_ids[slot] == eos_token_id}
            if not active:
                return
            yield [new_ids[slot] if slot in active else None for slot in range(len(prompts))]
            active -= {
                slot for slot in active if len(prompts[slot]) + length >= self.sequence_length
            }
            if not active or length == max_new_tokens:
                return
            logits = self.decode_one_token(ids, positions, cache)
            # Slots that have ended or have no prompt are decoded with the others; their positions
            # must stay inside the cache.
            positions = (positions + 1).clamp(max=self.sequence_length - 1)

    def _prompt_problems(self, prompts: list[list[int]]) -> Iterator[str]:
        if not 1 <= len(prompts) <= self.batch_size:
            yield (
                f"{len(prompts)} prompts do not fit: the model is compiled for 1 to "
                f"{self.batch_size} at a time. Raise INFERENCE_BATCH_SIZE."
            )
        for number, prompt in enumerate(prompts, start=1):
            name = f"Prompt {number} of {len(prompts)}"
            if not prompt:
                yield f"{name} has no tokens. Write at least one."
            elif len(prompt) >= self.sequence_length:
                yield (
                    f"{name} has {len(prompt)} tokens; the model is compiled for prompts of at "
                    f"most {self.sequence_length - 1} (INFERENCE_SEQUENCE_LENGTH="
                    f"{self.sequence_length}, prompt and answer together). Shorten the prompt or "
                    "raise INFERENCE_SEQUENCE_LENGTH."
                )
            elif min(prompt) < 0 or max(prompt) >= self.vocab_size:
                yield (
                    f"{name} has ids from {min(prompt)} to {max(prompt)}; the model knows 0 to "
                    f"{self.vocab_size - 1}. Tokenise it with the model's tokenizer."
                )


def right_padded(
    prompts: list[list[int]], *, slots: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as ids [slots, length], zeros after each, and the prompts' lengths [slots].

    A slot without a prompt has length 1.
    """
    ids = torch.zeros(slots, length, dtype=torch.int64)
    lengths = torch.ones(slots, dtype=torch.int64)
    for slot, prompt in enumerate(prompts):
        ids[slot, : len(prompt)], lengths[slot] = torch.tensor(prompt), len(prompt)
    return ids, lengths


def log_probability(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[id], in nats, float32: logits [n, vocab], ids [n] -> [n]."""
    logits = logits.float()
    return logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)


def with_empty_slots(logits: torch.Tensor, slots: int) -> torch.Tensor:
    """logits [prompts, vocab], with zeros for the slots that have no prompt [slots, vocab]."""
    return F.pad(logits, (0, 0, 0, slots - len(logits)))


def sample(
    logits: torch.Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Draw one id per slot from logits [batch, vocab] with the slot's generator; returns ids
    [batch].

    Keeps the `top_k` likeliest ids, and of those the fewest whose probabilities sum to `top_p`.
    top_k=0 and top_p=1.0 keep all ids. top_p is nucleus sampling (Holtzman et al. 2020,
    arXiv:1904.09751); as in transformers it is applied after temperature and top_k. temperature and
    top_p are above 0, so the likeliest id is always kept.
    """
    size = logits.shape[-1]
    likeliest, ids = torch.topk(
        logits.float() / temperature, min(top_k, size) if top_k else size, sorted=True
    )
    probabilities = likeliest.softmax(-1)
    if top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities  # 0 for the likeliest
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = [
        torch.multinomial(slot, 1, generator=generator)
        for slot, generator in zip(probabilities, generators, strict=True)
    ]
    return ids.gather(-1, torch.stack(drawn)).squeeze(-1)


def seed_of(seed: int, name: object) -> int:
    """A seed for each thing with a name or number; neighbouring numbers give unrelated ones."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
