"""The base and the fine-tuned model answer the same held-out questions.

The fine-tuned model is the compiled one. The base model is not compiled: transformers generates its
answers on this host.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from stages.backends.evaluate import (
    cost_note,
    evaluation_device,
    load_for_evaluation,
    loss_dtype,
)
from stages.model.base import base_model_folder
from stages.run.cost import hourly_price
from stages.run.layout import COMPARISON_FILE
from stages.run.progress import Progress, printable
from stages.run.settings import Settings
from stages.text.answer import Answerer
from stages.text.comparison import (
    Compared,
    comparison_metrics,
    side_by_side,
    write_comparison,
)
from stages.text.questions import written_questions


def compare_answers(
    settings: Settings, held_out: Path, answerer: Answerer, work: Path
) -> dict[str, object]:
    """Ask both models the first COMPARE_ANSWERS questions of the file `held_out`; print the answers
    and write them to `work`. Both models take the likeliest token each time.

    Returns the metrics, empty where nothing was asked.
    """
    questions = written_questions(held_out)[: settings.compare_answers]
    asked, prompts = answerer.fitting(questions)
    if len(asked) < len(questions):
        left_out = len(questions) - len(asked)
        print(f"{left_out} held-out questions do not fit the compiled model", flush=True)
    if not asked:
        return {}
    greedy = replace(answerer.settings, do_sample=False)
    compared = []
    print(f"\nasking both models {len(asked)} held-out questions", flush=True)
    with Progress("comparison", 2 * len(asked), "answers") as progress:
        tuned = []
        for answer in answerer.answers(asked, greedy):
            tuned.append(answer)
            progress.update(1)
        base = base_answers(
            settings,
            prompts,
            end=answerer.format.end,
            pad=answerer.tokenizer.pad,
            sequence_length=answerer.model.sequence_length,
        )
        for one, prompt, ids in zip(tuned, prompts, base, strict=True):
            compared.append(Compared(one.question, answerer.answer(one.question, prompt, ids), one))
            progress.update(1)
    write_comparison(work / COMPARISON_FILE, compared)
    print(printable(side_by_side(compared)), flush=True)
    metrics = comparison_metrics(compared)
    print(f"\nheld-out questions  {'base':>10} {'fine-tuned':>12}   of {len(compared)}")
    for name, label in (("ended", "answers that end"), ("exact_matches", "exact matches")):
        print(f"  {label:<16} {metrics['base'][name]:>11} {metrics['fine_tuned'][name]:>12}")
    return {"comparison": metrics}


@torch.inference_mode()
def base_answers(
    settings: Settings, prompts: list[list[int]], *, end: int, pad: int, sequence_length: int
) -> Iterator[list[int]]:
    """The ids of the likeliest answer to each prompt, without `end`, in order.

    An answer has at most MAX_NEW_TOKENS, and with its prompt `sequence_length`, as the compiled
    model's. Says after the first what the rest costs, if that is much.
    """
    device = evaluation_device()
    dtype, _ = loss_dtype(settings, device)
    model = load_for_evaluation(base_model_folder(settings), dtype, device)
    started = time.monotonic()
    for number, prompt in enumerate(prompts, start=1):
        ids = torch.tensor([prompt], device=device)
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(settings.max_new_tokens, sequence_length - len(prompt)),
            do_sample=False,
            eos_token_id=end,
            pad_token_id=pad,
        )[0, len(prompt) :].tolist()
        yield answer[: answer.index(end)] if end in answer else answer
        if number == 1 and (
            note := cost_note(
                time.monotonic() - started,
                len(prompts),
                hourly_price(settings),
                "the base model's answers to {} questions",
                "COMPARE_ANSWERS",
                models=1,
            )
        ):
            print(note, flush=True)
