"""Turn a dataset's examples into packed sequences of token ids, and account for every token.

Publishes train/ and validation/ (`datasets.load_from_disk` reads them), the tokenizer and the
prompt template. PUSH_DATASET saves the sequences to S3 or the Hub too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stages.checks import require
from stages.run.cli import stage_command
from stages.run.layout import PROMPT_FILE, TOKENIZER_FOLDER
from stages.run.progress import Progress, printable
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings

if TYPE_CHECKING:
    from stages.text.examples import Example


@stage_command("data", "PUSH_DATASET")
def main(settings: Settings, output: Path) -> None:
    publish("data", settings, {}, output, lambda work: pack(settings, work))
    if settings.push_dataset:
        from stages.text.push import push

        push(settings.push_dataset, output)


def pack(settings: Settings, work: Path) -> StageResult:
    """Read, tokenise, split and pack DATASET into `work`; print the accounts and a sample."""
    from stages.model.notes import model_notes
    from stages.text.answer import encode_questions
    from stages.text.dataset import Layout, build
    from stages.text.examples import Columns, read_examples
    from stages.text.find_tokenizer import find_tokenizer
    from stages.text.prompt import PromptTemplate
    from stages.text.questions import read_questions

    s = settings
    require(s, "data")
    template, tokenizer = PromptTemplate(), find_tokenizer(s.model_id, s.model_revision)
    for line in model_notes(s, tokenizer):
        print(line, flush=True)
    # eval's prompts are checked now, not after the training is paid for.
    encode_questions(read_questions(s).questions, tokenizer, template, s.inference_sequence_length)
    columns = Columns(s.instruction_column, s.context_column, s.response_column)
    batches = read_examples(
        s.dataset,
        columns=columns,
        revision=s.dataset_revision,
        config=s.dataset_config,
        split=s.dataset_split,
    )
    layout = Layout(s.max_length, packing=s.packing, overlong=s.overlong, loss_on=s.loss_on)
    account = build(
        counted(batches),
        tokenizer,
        template,
        output=work,
        layout=layout,
        validation_fraction=s.validation_fraction,
        seed=s.seed,
    )
    tokenizer.save(work / TOKENIZER_FOLDER)
    template.save(work / PROMPT_FILE)
    print(
        f"a sample of {account.tokens_in:,} tokens:\n\n{printable(account.sample)}\n\n"
        f"{account.table()}",
        flush=True,
    )
    return StageResult(
        tokens=account.tokens_in, metrics={**account.figures(), "vocabulary": tokenizer.vocab_size}
    )


def counted(batches: Iterator[list[Example]]) -> Iterator[list[Example]]:
    """The same batches; shows the number of examples so far. The total is not known."""
    with Progress("data", None, "examples") as progress:
        for batch in batches:
            yield batch
            progress.update(len(batch))


if __name__ == "__main__":
    main()
