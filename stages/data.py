"""Turn a dataset's examples into packed sequences of token ids, and account for every token.

Publishes train/ and validation/ (`datasets.load_from_disk` reads them), the tokenizer with a chat
template, and the prompt's format. PUSH_DATASET saves the sequences to S3 or the Hub too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from stages.checks import require
from stages.run.cli import stage_command
from stages.run.layout import HELD_OUT_FILE, TOKENIZER_FOLDER
from stages.run.progress import Progress, printable
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings

if TYPE_CHECKING:
    from stages.text.accounting import Accounting
    from stages.text.examples import Example, Examples
    from stages.text.prompt import PromptFormat
    from stages.text.tokens import TextTokenizer


@stage_command("data", "PUSH_DATASET")
def main(settings: Settings, output: Path) -> None:
    publish("data", settings, {}, output, lambda work: pack(settings, work))
    if settings.push_dataset:
        from stages.text.push import push

        push(settings.push_dataset, output)


def pack(settings: Settings, work: Path) -> StageResult:
    """Read, tokenise, split and pack DATASET into `work`; print the accounts and a sample."""
    from stages.model.notes import model_notes
    from stages.text.chat_format import set_chat_template
    from stages.text.choose_format import choose_format
    from stages.text.dataset import Layout, build
    from stages.text.find_tokenizer import find_tokenizer
    from stages.text.questions import write_questions
    from stages.text.repeats import Repeats

    s = settings
    require(s, "data")
    tokenizer = find_tokenizer(s.model_id, s.model_revision)
    dataset = examples_of(s)
    for line in dataset.read_as:
        print(line, flush=True)
    prompt_format = choose_format(s, dataset.columns, tokenizer)
    print(f"prompt format: {prompt_format.description()}", flush=True)
    for line in model_notes(s, tokenizer, prompt_format.end):
        print(line, flush=True)
    prompts = check_eval_inputs(s, tokenizer, prompt_format, work)
    layout = Layout(s.max_length, packing=s.packing, overlong=s.overlong, loss_on=s.loss_on)
    sensitive = Counter[str]()
    account = build(
        counted(dataset.batches, sensitive),
        tokenizer,
        prompt_format,
        output=work,
        layout=layout,
        validation_fraction=s.validation_fraction,
        seed=s.seed,
        repeats=Repeats(prompts),
    )
    account.sensitive = dict(sensitive)
    set_chat_template(tokenizer, prompt_format.chat_template())
    write_questions(work / HELD_OUT_FILE, account.held_out)
    tokenizer.save(work / TOKENIZER_FOLDER)
    prompt_format.save(work)
    print_account(account, [*dataset.notes(), *prompt_format.notes()])
    return StageResult(
        tokens=account.tokens_in,
        metrics={
            "columns": dataset.columns.describe(),
            "prompt_format": prompt_format.description(),
            **account.figures(),
            "vocabulary": tokenizer.vocab_size,
        },
    )


def print_account(account: Accounting, notes: list[str]) -> None:
    """Show a sample, the accounts, and what is to be known of the data."""
    from stages.text.data_notes import data_notes

    print(
        f"a sample of {account.tokens_in:,} tokens:\n\n{printable(account.sample)}\n\n"
        f"{account.table()}",
        flush=True,
    )
    for line in (*(" ".join(note) for note in data_notes(account.figures())), *notes):
        print(f"note: {printable(line)}", flush=True)


def check_eval_inputs(
    settings: Settings, tokenizer: TextTokenizer, format: PromptFormat, work: Path
) -> list[list[int]]:
    """Raise InputError for what eval would refuse: now, not after the training is paid for. Returns
    the ids of PROMPTS' questions."""
    from stages.text.answer import encode_questions
    from stages.text.eval_set import packed_eval_set
    from stages.text.questions import read_questions

    questions = read_questions(settings).questions
    prompts = encode_questions(questions, tokenizer, format, settings.inference_sequence_length)
    if settings.eval_set:
        with TemporaryDirectory(dir=work) as folder:
            packed_eval_set(settings, tokenizer, format, Path(folder))
    return prompts


def examples_of(settings: Settings) -> Examples:
    """The examples that the settings name."""
    from stages.text.columns import columns_of
    from stages.text.examples import open_examples

    s = settings
    return open_examples(
        s.dataset,
        columns=columns_of(s),
        revision=s.dataset_revision,
        config=s.dataset_config,
        split=s.dataset_split,
        most=s.max_examples,
    )


def counted(batches: Iterator[list[Example]], sensitive: Counter[str]) -> Iterator[list[Example]]:
    """The same batches; shows the number of examples so far. The total is not known. Counts in
    `sensitive` the examples that have a text of such a kind."""
    from stages.text.sensitive import count_sensitive

    with Progress("data", None, "examples") as progress:
        for batch in batches:
            sensitive += count_sensitive(batch)
            yield batch
            progress.update(len(batch))


if __name__ == "__main__":
    main()
