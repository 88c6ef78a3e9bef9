"""What eval measures the base and the fine-tuned model on: what was held out, or EVAL_SET."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from stages.run.errors import InputError
from stages.run.layout import HELD_OUT_FILE, TRAIN_SPLIT, VALIDATION_SPLIT
from stages.run.settings import Settings
from stages.text.columns import columns_of
from stages.text.conversation import Conversation, is_empty, until_last_answer
from stages.text.examples import Example, Examples, open_examples
from stages.text.formats import FORMAT_NAMES
from stages.text.questions import Question, answered_questions, written_questions

if TYPE_CHECKING:
    from stages.text.prompt import PromptFormat
    from stages.text.tokens import TextTokenizer

HELD_OUT, EVAL_SET = "held-out", "EVAL_SET"


@dataclass(frozen=True)
class EvalSet:
    """`name`: HELD_OUT or EVAL_SET. `sequences`: folder of packed sequences; None where there are
    none. `questions`: what both models may be asked, with the expected answers."""

    name: str
    sequences: Path | None
    questions: list[Question]


def held_out(data: Path) -> EvalSet:
    """What the data stage, which published `data`, held out of the training."""
    split = data / VALIDATION_SPLIT
    return EvalSet(
        HELD_OUT, split if split.is_dir() else None, written_questions(data / HELD_OUT_FILE)
    )


def read_eval_set(settings: Settings) -> None:
    """Raise InputError for what is wrong with EVAL_SET, as far as the standard library shows it."""
    if settings.eval_set:
        for _ in _open(settings).batches:
            pass


def _open(settings: Settings) -> Examples:
    s = settings
    if not Path(s.eval_set).is_file():  # of a folder, the split "train" would be read
        raise InputError(
            f"EVAL_SET={s.eval_set} is not a file. Name one of examples on this machine "
            f"({FORMAT_NAMES})."
        )
    return open_examples(s.eval_set, columns=columns_of(s), setting=EVAL_SET)


def packed_eval_set(
    settings: Settings, tokenizer: TextTokenizer, format: PromptFormat, folder: Path
) -> EvalSet:
    """EVAL_SET as `format` writes it, packed into `folder` as the data stage packs DATASET.

    Raises InputError for examples that cannot be used.
    """
    from stages.text.dataset import Layout, build

    s, first = settings, list[Conversation]()
    examples = _open(settings)

    def seen() -> Iterator[list[Example]]:
        for batch in examples.batches:
            answered = (until_last_answer(one.messages) for one in batch)
            usable = (one for one in answered if not is_empty(one))
            first.extend(islice(usable, s.compare_answers - len(first)))
            yield batch

    layout = Layout(s.max_length, loss_on=s.loss_on)
    try:
        account = build(seen(), tokenizer, format, output=folder, layout=layout)
    except InputError as error:
        raise InputError(
            one if s.eval_set in one else f"EVAL_SET={s.eval_set}: {one}" for one in error.problems
        ) from None
    for line in (*examples.read_as, *examples.notes()):
        print(line, flush=True)
    counts = (
        (account.empty, "without a question or an answer left out"),
        (account.dropped, "left out, with no answer within MAX_LENGTH"),
        (account.over_long - account.dropped, "cut to MAX_LENGTH"),
    )
    of_them = "".join(f", {count:,} {what}" for count, what in counts if count)
    print(
        f"EVAL_SET={s.eval_set}: {account.rows_in:,} examples{of_them}, {account.train.packed:,} "
        f"tokens in {account.train.rows:,} sequences",
        flush=True,
    )
    asked = answered_questions(first, "EVAL_SET, question")
    return EvalSet(EVAL_SET, folder / TRAIN_SPLIT, list(asked))
