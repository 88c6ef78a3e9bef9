"""Ask the compiled model, and compare the base and the fine-tuned model on what was held out, or on
EVAL_SET: answers side by side, and losses.

With PROMPT it answers only that, at once, and publishes nothing. Otherwise it answers the prompts
in PROMPTS and publishes answers.jsonl, comparison.jsonl, the losses and the figures of LM_EVAL's
tasks. GATES make it fail where the figures are not good enough.
"""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

from stages.run.backend import backend_module
from stages.run.cli import stage_command
from stages.run.errors import StageFailure
from stages.run.gates import gate_problems
from stages.run.harness import require_harness
from stages.run.layout import ANSWERS_FILE
from stages.run.manifest import manifest_of
from stages.run.progress import Progress, printable
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings
from stages.text.answer import Answer, Answerer, write_answers
from stages.text.eval_set import EvalSet, held_out, packed_eval_set
from stages.text.questions import question_of, read_questions

SHOWN = 10  # printed answers; answers.jsonl has all


@stage_command(
    "eval",
    "PROMPT",
    "CONTEXT",
    "GATES",
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
        harness = require_harness(settings)
        from stages.backends.comparison import compare_answers
        from stages.backends.harness import measure_tasks

        answerer = Answerer(compile_inference, backend_module("generate", settings).load, settings)
        with TemporaryDirectory(dir=work) as folder:
            eval_set = held_out(data)
            if settings.eval_set:  # refused before anything is asked
                eval_set = packed_eval_set(
                    settings, answerer.tokenizer, answerer.format, Path(folder)
                )
            answers = answer_all(settings, answerer)
            write_answers(work / ANSWERS_FILE, answers)
            metrics: dict[str, object] = {
                "answers": len(answers),
                "ended": sum(answer.ended for answer in answers),
                **exact_matches(answers),
            }
            metrics |= compare_answers(settings, eval_set, answerer, work)
            metrics |= compare_losses(settings, eval_set, consolidate)
        metrics |= measure_tasks(harness, settings, consolidate, work)
        return StageResult(metrics=metrics, tokens=sum(answer.tokens for answer in answers))

    publish("eval", settings, inputs, output, build)
    require_gates(settings, output)


def answer_one(settings: Settings, compiled: Path) -> None:
    """Stream the answer to PROMPT to the terminal."""
    question = question_of(settings.prompt, settings.context)
    answerer = Answerer(compiled, backend_module("generate", settings).load, settings)
    for piece in answerer.stream(question):
        print(printable(piece), end="", flush=True)
    print(flush=True)


def answer_all(settings: Settings, answerer: Answerer) -> list[Answer]:
    """Answer every question of PROMPTS and print the first few."""
    asked = read_questions(settings)
    if note := asked.note(settings):
        print(note, flush=True)
    questions = asked.questions
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


def require_gates(settings: Settings, output: Path) -> None:
    """Raise StageFailure unless what eval has published passes GATES."""
    if not settings.gates:
        return
    problems = gate_problems(settings.gates, (manifest_of(output) or {}).get("metrics", {}))
    if problems:
        raise StageFailure("\n".join(problems))
    print(f"GATES: passed {settings.gates}", flush=True)


def compare_losses(settings: Settings, eval_set: EvalSet, tuned: Path) -> dict[str, object]:
    """Loss (nats per supervised token) and perplexity of the base and the fine-tuned model, and the
    dtype that they were computed in.

    With QUANTIZE also those of the quantised model; raises StageFailure where its loss is more than
    MAX_LOSS_INCREASE above.
    """
    if eval_set.sequences is None:
        print("\nNo document is held out (VALIDATION_FRACTION=0): no validation loss.", flush=True)
        if settings.quantize != "none":
            print(f"What QUANTIZE={settings.quantize} adds to it is not known.", flush=True)
        return {}
    from stages.backends.evaluate import validation_losses

    losses = validation_losses(settings, eval_set.sequences, tuned)
    print(f"\n{eval_set.name + ' sequences':<20}{'base':>10} {'fine-tuned':>12}")
    print(f"  loss (nats)       {losses.base:>10.4f} {losses.fine_tuned:>12.4f}")
    print(
        f"  perplexity        {perplexity(losses.base):>10.2f} "
        f"{perplexity(losses.fine_tuned):>12.2f}",
        flush=True,
    )
    models = {"base": losses.base, "fine_tuned": losses.fine_tuned}
    if losses.quantized is not None:
        models["quantized"] = losses.quantized
        require_small_increase(settings, losses.quantized - losses.fine_tuned)
    return {
        **{name: {"loss": loss, "perplexity": perplexity(loss)} for name, loss in models.items()},
        "loss_dtype": losses.dtype,
    }


def require_small_increase(settings: Settings, increase: float) -> None:
    """Print what QUANTIZE adds to the loss, in nats; raise StageFailure if that is too much."""
    setting = f"QUANTIZE={settings.quantize}"
    print(f"  {setting} adds {increase:+.4f} nats to the fine-tuned model's loss", flush=True)
    # Written so that an increase of NaN fails as well.
    if not increase <= settings.max_loss_increase:
        raise StageFailure(
            f"{setting} adds {increase:.4f} nats to the loss, and MAX_LOSS_INCREASE="
            f"{settings.max_loss_increase:g} allows no more. Nothing was published. Set "
            "QUANTIZE=none, or raise MAX_LOSS_INCREASE."
        )


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


if __name__ == "__main__":
    main()
