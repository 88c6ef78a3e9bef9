"""The base and the fine-tuned model answer the same questions.

The fine-tuned model is the compiled one. The base model is not compiled: transformers generates its
answers on this host.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from stages.backends.decoding import log_probability
from stages.backends.device import device_of
from stages.backends.evaluate import load_for_evaluation, loss_dtype
from stages.model.base import base_model_folder
from stages.run.cost import dollars, hourly_price
from stages.run.layout import COMPARISON_FILE
from stages.run.progress import Progress, duration, printable
from stages.run.settings import Settings
from stages.text.answer import Answerer
from stages.text.comparison import (
    Compared,
    comparison_metrics,
    comparison_table,
    side_by_side,
    write_comparison,
)
from stages.text.eval_set import EVAL_SET, HELD_OUT, EvalSet

TIMED = 8  # tokens that tell how long an answer of the base model takes


def compare_answers(
    settings: Settings, eval_set: EvalSet, answerer: Answerer, work: Path
) -> dict[str, object]:
    """Ask both models the first COMPARE_ANSWERS questions of `eval_set`; print the answers and
    write them to `work`. Both models take the likeliest token each time.

    Says beforehand how long it may take. Returns the metrics; where nothing of EVAL_SET was asked
    they say so, and no gate takes other answers for those to it.
    """
    questions = eval_set.questions[: settings.compare_answers]
    asked, prompts = answerer.fitting(questions)
    if len(asked) < len(questions):
        left_out = len(questions) - len(asked)
        print(f"{left_out} {eval_set.name} questions do not fit the compiled model", flush=True)
    if not asked:
        named = eval_set.name == EVAL_SET
        return {"comparison": {"set": EVAL_SET, "questions": 0}} if named else {}
    base = BaseModel(settings, answerer)
    print(f"\nasking both models {len(asked)} {eval_set.name} questions", flush=True)
    print(base.forecast(prompts), flush=True)
    compared = []
    greedy = replace(answerer.settings, do_sample=False)
    with Progress("comparison", 2 * len(asked), "answers") as progress:
        tuned = []
        for answer in answerer.answers(asked, greedy):
            tuned.append(answer)
            progress.update(1)
        for question, prompt, one in zip(asked, prompts, tuned, strict=True):
            answer = answerer.answer(question, prompt, *base.answer(prompt))
            compared.append(Compared(question, answer, one))
            progress.update(1)
    write_comparison(work / COMPARISON_FILE, compared)
    print(printable(side_by_side(compared)), flush=True)
    metrics = comparison_metrics(compared, short_only=eval_set.name == HELD_OUT)
    print(comparison_table(metrics, eval_set.name), flush=True)
    return {"comparison": {"set": eval_set.name, **metrics}}


class BaseModel:
    """The base model, and its likeliest answers as long as the compiled model's may be."""

    def __init__(self, settings: Settings, answerer: Answerer):
        self.device = device_of(settings).eager_device()
        self._settings, self._answerer = settings, answerer
        dtype, _ = loss_dtype(settings, self.device)
        self._model = load_for_evaluation(base_model_folder(settings), dtype, self.device)

    @torch.inference_mode()
    def answer(self, prompt: list[int]) -> tuple[list[int], float]:
        """The ids of the answer without its end, and its log-probability in nats with its end."""
        generated = self._generate(prompt, self._room(prompt))
        # The logits before each token of the answer.
        whole = torch.tensor([prompt + generated[:-1]], device=self.device)
        logits = self._model(whole, logits_to_keep=len(generated), use_cache=False).logits[0]
        nats = log_probability(logits, torch.tensor(generated, device=self.device)).sum()
        end = self._answerer.format.end
        return generated[: generated.index(end)] if end in generated else generated, float(nats)

    @torch.inference_mode()
    def forecast(self, prompts: list[list[int]]) -> str:
        """How long the answers to `prompts` take at most, and what they cost, as a line."""
        started = time.monotonic()
        timed = min(TIMED, self._room(prompts[0]))
        self._generate(prompts[0], timed, least=timed)
        seconds = (time.monotonic() - started) / timed * sum(map(self._room, prompts))
        price = hourly_price(self._settings)
        cost = f" and {dollars(seconds, price):.2f} USD" if price else ""
        return (
            f"the base model's answers take at most about {duration(seconds)}{cost} "
            f"(COMPARE_ANSWERS={self._settings.compare_answers}, "
            f"MAX_NEW_TOKENS={self._settings.max_new_tokens})"
        )

    def _room(self, prompt: list[int]) -> int:
        """The most tokens of an answer to `prompt`."""
        length = self._answerer.model.sequence_length - len(prompt)
        return min(self._settings.max_new_tokens, length)

    def _generate(self, prompt: list[int], most: int, least: int = 0) -> list[int]:
        ids = torch.tensor([prompt], device=self.device)
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=least,
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=self._answerer.format.end,
            pad_token_id=self._answerer.tokenizer.pad,
        )
        answer: list[int] = output[0, len(prompt) :].tolist()
        return answer
