"""Ask the compiled model, and compare the losses of the base and the fine-tuned model on the
held-out sequences.

With PROMPT it answers only that, at once, and publishes nothing. Otherwise it answers the prompts
in PROMPTS and publishes answers.jsonl and the losses.
"""

from __future__ import annotations

import math
from pathlib import Path

from stages.run.backend import backend_module
from stages.run.cli import stage_command
from stages.run.layout import ANSWERS_FILE, VALIDATION_SPLIT
from stages.run.progress import Progress, printable
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings
from stages.text.answer import Answer, Answerer, write_answers
from stages.text.questions import question_of, read_questions

SHOWN = 10  # printed answers; answers.jsonl has all


@stage_command(
    "eval",
    "PROMPT",
    "CONTEXT",
    data="Folder that data published.",
    consolidate="Folder that consolidate published.",
    compile_inference="Folder that compile-inference published.",
)
def main(
    settings: Settings, data: Path, consolidate: Path, compile_inference: Path, output: Path
) -> None:
    if settings.prompt:
        answer_one(settings, compile_inference)
        return
    inputs = {"data": data, "consolidate": consolidate, "compile-inference": compile_inference}

    def build(work: Path) -> StageResult:
        answers = answer_all(settings, compile_inference)
        write_answers(work / ANSWERS_FILE, answers)
        metrics = {
            "answers": len(answers),
            **exact_matches(answers),
            **compare_losses(settings, data, consolidate),
        }
        return StageResult(metrics=metrics, tokens=sum(answer.tokens for answer in answers))

    publish("eval", settings, inputs, output, build)


def answer_one(settings: Settings, compiled: Path) -> None:
    """Stream the answer to PROMPT to the terminal."""
    question = question_of(settings.prompt, settings.context)
    answerer = Answerer(compiled, backend_module("generate", settings).load, settings)
    for piece in answerer.stream(question):
        print(printable(piece), end="", flush=True)
    print(flush=True)


def answer_all(settings: Settings, compiled: Path) -> list[Answer]:
    """Answer every question of PROMPTS and print the first few."""
    asked = read_questions(settings)
    if note := asked.note(settings):
        print(note, flush=True)
    questions = asked.questions
    answerer = Answerer(compiled, backend_module("generate", settings).load, settings)
    answers = []
    with Progress("eval", len(questions), "answers") as progress:
        for answer in answerer.answers(questions):
            answers.append(answer)
            progress.update(1)
    for answer in answers[:SHOWN]:
        cut = "" if answer.ended else " [cut]"
        print(printable(f"\n{answer.question}\nA: {answer.answer}{cut}"), flush=True)
    if len(answers) > SHOWN:
        print(f"\n... {len(answers) - SHOWN} more in answers.jsonl", flush=True)
    return answers


def exact_matches(answers: list[Answer]) -> dict[str, int]:
    """The number of answers that equal the expected text, and of those that have one."""
    judged = [answer for answer in answers if answer.question.expected is not None]
    if not judged:
        return {}
    matches = sum(answer.answer == answer.question.expected for answer in judged)
    print(f"\nexact matches: {matches} of {len(judged)}", flush=True)
    return {"exact_matches": matches, "judged": len(judged)}


def compare_losses(settings: Settings, data: Path, tuned: Path) -> dict[str, object]:
    """Loss (nats per supervised token) and perplexity of the base and the fine-tuned model, and the
    dtype that they were computed in."""
    if not (data / VALIDATION_SPLIT).is_dir():
        print("\nNo document is held out (VALIDATION_FRACTION=0): no validation loss.", flush=True)
        return {}
    from stages.backends.evaluate import validation_losses

    losses = validation_losses(settings, data, tuned)
    print(f"\nheld-out sequences {'base':>10} {'fine-tuned':>12}")
    print(f"  loss (nats)      {losses.base:>10.4f} {losses.fine_tuned:>12.4f}")
    print(
        f"  perplexity       {perplexity(losses.base):>10.2f} "
        f"{perplexity(losses.fine_tuned):>12.2f}",
        flush=True,
    )
    models = {"base": losses.base, "fine_tuned": losses.fine_tuned}
    return {
        **{name: {"loss": loss, "perplexity": perplexity(loss)} for name, loss in models.items()},
        "loss_dtype": losses.dtype,
    }


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


if __name__ == "__main__":
    main()
