"""Documents that repeat each other are counted, in the data and across what is held out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from stages.run.digests import content_digest
from stages.text import repeats
from stages.text.accounting import Accounting
from stages.text.conversation import Message
from stages.text.data_notes import data_notes
from stages.text.dataset import Layout, build
from stages.text.examples import Example
from stages.text.prompt import TextFormat
from stages.text.repeats import Repeats
from stages.text.text_template import PLAIN
from stages.text.tokens import TextTokenizer
from tests.conftest import ROOT
from tests.text.conversations import example, prompt_ids, texts_of

WORDS = [*"abcdefghijklmnopqrst"]
TOKENIZER = TextTokenizer.load(ROOT / "data/demo/model")


def sentence(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def compared(
    folder: Path, rows: list[Example], fraction: float = 0.0, asked: list[str] | None = None
) -> Accounting:
    half = len(rows) // 2
    return build(
        [rows[:half], rows[half:]],
        TOKENIZER,
        TextFormat(TOKENIZER),
        output=folder,
        layout=Layout(400),
        validation_fraction=fraction,
        repeats=Repeats([prompt_ids(TOKENIZER, question) for question in asked or []]),
    )


def pairs(count: int) -> list[Example]:
    """`count` documents that are like no other, and as many that differ from them in a word."""
    firsts = [example(f"{n}", f"Question {n}?", "", sentence(n)) for n in range(count)]
    twins = [
        example(f"{n}'", f"Question {n}?", "", f"{sentence(n, 59)} twice") for n in range(count)
    ]
    return firsts + twins


def test_documents_that_differ_in_a_word_are_near_duplicates(tmp_path: Path) -> None:
    account = compared(tmp_path, pairs(100))
    assert account.repeated["compared"] == 200
    assert 95 <= account.repeated["near"] <= 100  # MinHash misses one in a hundred
    assert account.duplicate == 0


def test_other_documents_are_none(tmp_path: Path) -> None:
    account = compared(tmp_path, pairs(100)[:100])
    assert account.repeated["near"] == 0


def test_equal_documents_are_duplicates_and_not_near_ones(tmp_path: Path) -> None:
    rows = pairs(50)[:50]
    account = compared(tmp_path, rows * 3)
    assert (account.duplicate, account.repeated["compared"]) == (100, 50)
    assert account.repeated["near"] == 0


def test_held_out_documents_that_are_trained_on_are_counted(tmp_path: Path) -> None:
    rows = pairs(100)
    account = compared(tmp_path, rows, fraction=0.2)
    held_out = {texts_of(Example("", messages)) for messages in account.held_out}
    leaks = 0
    for first, twin in zip(rows[:100], rows[100:], strict=True):
        leaks += (texts_of(first) in held_out) != (texts_of(twin) in held_out)
    assert account.repeated["held_out"] == 40 and leaks > 20
    assert account.repeated["asked_in_training"] == leaks
    assert 0.8 * leaks <= account.repeated["near_training"] <= leaks


def test_texts_without_a_prompt_ask_nothing(tmp_path: Path) -> None:
    texts = [Example(f"{n}", (Message("assistant", sentence(n)),)) for n in range(40)]
    account = build(
        [texts],
        TOKENIZER,
        TextFormat(TOKENIZER, PLAIN),
        output=tmp_path,
        layout=Layout(400),
        validation_fraction=0.2,
        repeats=Repeats(),
    )
    assert account.repeated["held_out"] == 8
    assert account.repeated["asked_in_training"] == account.repeated["near_training"] == 0


@pytest.mark.parametrize("trained", [0, 3])
def test_prompts_that_are_trained_on_are_counted(tmp_path: Path, trained: int) -> None:
    questions = [f"Question {n}?" for n in range(trained)] + ["Quite another?", "Question?"]
    account = compared(tmp_path, pairs(10), asked=questions)
    assert account.repeated["prompts"] == trained + 2
    assert account.repeated["prompts_in_training"] == trained


def test_the_answers_of_one_conversation_are_no_near_duplicates(tmp_path: Path) -> None:
    class PerAnswer(TextFormat):
        def documents(self, conversations):  # each conversation twice, as templates do that think
            return [
                one if isinstance(one, str) else one * 2 for one in super().documents(conversations)
            ]

    account = build(
        [pairs(20)[:20]],
        TOKENIZER,
        PerAnswer(TOKENIZER),
        output=tmp_path,
        layout=Layout(400),
        repeats=Repeats(),
    )
    assert account.per_answer == 20
    assert (account.repeated["compared"], account.repeated["near"]) == (20, 0)


def test_of_very_many_documents_the_first_are_compared_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "MOST", 30)
    account = compared(tmp_path, pairs(50))
    assert (account.repeated["compared"], account.repeated["not_compared"]) == (50, 50)
    assert ("50", "documents after the first were not compared with others.") in data_notes(
        account.figures()
    )


def test_comparing_changes_nothing_that_is_published(tmp_path: Path) -> None:
    rows = pairs(20)
    compared(tmp_path / "compared", rows, fraction=0.2)
    build(
        [rows[:20], rows[20:]],
        TOKENIZER,
        TextFormat(TOKENIZER),
        output=tmp_path / "plain",
        layout=Layout(400),
        validation_fraction=0.2,
    )
    for split in ("train", "validation"):
        assert content_digest(tmp_path / "plain" / split) == content_digest(
            tmp_path / "compared" / split
        )


def test_every_document_is_in_the_histogram_of_lengths(tmp_path: Path) -> None:
    account = compared(tmp_path, [*pairs(100), example("long", "Why?", "", sentence(1, 2000))])
    lengths = account.lengths
    assert sum(lengths["counts"]) == 201 and len(lengths["edges"]) == len(lengths["counts"]) + 1
    assert lengths["longest"][0] > lengths["edges"][-1]
