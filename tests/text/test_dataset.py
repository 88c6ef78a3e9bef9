"""Rows to packed rows: what is written is what went in, each token once, and the accounts say
so."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from stages.run.errors import InputError, StageFailure
from stages.text.accounting import Accounting, SplitAccount
from stages.text.dataset import Layout, build
from stages.text.documents import ANSWER, encode
from stages.text.examples import Example
from stages.text.prompt import TextFormat
from tests.text.conversations import dolly, example, texts_of
from tests.torture.plugin import examples

LENGTH = 48
WORDS = ["the", "cat", "sat", "on", "mat", "and", "then", "they", "all", "went", "home"]
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join)
datasets_of_rows = st.lists(
    st.tuples(sentences, st.just("") | sentences, sentences), min_size=1, max_size=25
)


def as_rows(texts) -> list[Example]:
    return [example(f"row {number}", *text) for number, text in enumerate(texts, 1)]


def numbered(count: int) -> list[Example]:
    return as_rows((f"{number} the cat", "", "sat " * (number % 9 + 1)) for number in range(count))


def read(folder: Path) -> list[dict[str, list[int]]]:
    with pa.memory_map(str(folder / "data-00000-of-00001.arrow")) as file:
        return pa.ipc.open_stream(file).read_all().to_pylist()


def pieces(rows: list[dict[str, list[int]]], part: str = "input_ids") -> list[list[int]]:
    """What each row holds of each segment, split where positions restart; padding left out by its
    labels and position."""
    found = []
    for row in rows:
        starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        found += [
            row[part][begin:end] for begin, end in zip(starts, [*starts[1:], None], strict=True)
        ]
    return found


def documents(rows: list[Example], tokenizer) -> list[tuple[list[int], int]]:
    encoded = encode(rows, tokenizer, TextFormat(tokenizer))
    ids, prompts = iter((encoded.ids & ~ANSWER).tolist()), encoded.prompt_lengths.tolist()
    return [
        ([next(ids) for _ in range(length)], prompt)
        for length, prompt in zip(encoded.lengths.tolist(), prompts, strict=True)
    ]


@pytest.fixture
def tokenizer(tokenizers):
    return tokenizers["byte_level"]  # has a padding token, so padding can be told from EOS


@pytest.mark.torture("fuzz")
@examples(60, 120)
@given(
    texts=datasets_of_rows,
    loss_on=st.sampled_from(["all", "response"]),
    fraction=st.sampled_from([0.0, 0.3]),
)
def test_every_document_that_fits_stands_whole_in_one_row_of_one_split(
    tokenizers, tmp_path_factory, texts, loss_on, fraction
):
    tokenizer, output, rows = (
        tokenizers["byte_level"],
        tmp_path_factory.mktemp("out"),
        as_rows(texts),
    )
    build(
        [rows],
        tokenizer,
        TextFormat(tokenizer),
        output=output,
        layout=Layout(400, loss_on=loss_on),
        validation_fraction=fraction,
    )
    written = list(chain.from_iterable(read(folder) for folder in output.iterdir()))
    assert all(len(row[column]) == 400 for row in written for column in row)
    segments = zip(
        pieces(written), pieces(written, "labels"), pieces(written, "position_ids"), strict=True
    )
    found = [
        (ids, labels)
        for ids, labels, positions in segments
        if positions == list(range(len(ids))) and ids[0] != tokenizer.pad
    ]
    masked = [
        (ids, ([-100] * prompt if loss_on == "response" else ids[:prompt]) + ids[prompt:])
        for ids, prompt in documents(rows, tokenizer)
    ]
    assert sorted(found) == sorted(masked)


@pytest.mark.torture("fuzz")
@examples(60, 120)
@given(texts=datasets_of_rows)
def test_padding_is_ignored_by_the_loss_and_has_positions_of_its_own(
    tokenizers, tmp_path_factory, texts
):
    tokenizer, output = tokenizers["byte_level"], tmp_path_factory.mktemp("out")
    build([as_rows(texts)], tokenizer, TextFormat(tokenizer), output=output, layout=Layout(400))
    for row in read(output / "train"):
        padding = [at for at, id in enumerate(row["input_ids"]) if id == tokenizer.pad]
        assert padding == list(range(400 - len(padding), 400))
        assert [row["position_ids"][at] for at in padding] == list(range(len(padding)))
        assert [at for at, label in enumerate(row["labels"]) if label == -100] == padding


@pytest.mark.torture("fuzz")
@examples(60, 120)
@given(texts=datasets_of_rows, batch=st.integers(1, 7))
def test_concat_gives_the_tutorials_chunks(folders, tokenizers, tmp_path_factory, texts, batch):
    """Format, tokenise with the tokenizer's own rules, carry the remainder over batches, cut."""
    plain, output, rows = (
        Tokenizer.from_file(str(folders["llama"] / "tokenizer.json")),
        tmp_path_factory.mktemp("out"),
        as_rows(texts),
    )
    chunks, remainder = [], []
    for begin in range(0, len(rows), batch):
        for row in rows[begin : begin + batch]:
            remainder += plain.encode(dolly(*texts_of(row)) + "</s>").ids
        whole = len(remainder) // LENGTH * LENGTH
        chunks += [remainder[at : at + LENGTH] for at in range(0, whole, LENGTH)]
        remainder = remainder[whole:]
    batches = [rows[begin : begin + batch] for begin in range(0, len(rows), batch)]
    if chunks:
        account = build(
            batches,
            tokenizers["llama"],
            TextFormat(tokenizers["llama"]),
            output=output,
            layout=Layout(LENGTH, packing="concat"),
        )
        assert (
            [row["input_ids"] for row in read(output / "train")]
            == chunks
            == [row["labels"] for row in read(output / "train")]
        )
        assert account.train.left_over == len(remainder)


def test_datasets_reads_what_is_written(tokenizer, tmp_path):
    from datasets import load_from_disk

    build(
        [numbered(40)],
        tokenizer,
        TextFormat(tokenizer),
        output=tmp_path,
        layout=Layout(LENGTH),
        validation_fraction=0.2,
    )
    for split in ("train", "validation"):
        data = load_from_disk(tmp_path / split)
        assert data.to_list() == read(tmp_path / split)
        assert {
            name: (kind.feature.dtype, kind.length) for name, kind in data.features.items()
        } == dict.fromkeys(data.features, ("int32", LENGTH))
        assert str(data.split) == split


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_the_same_rows_give_the_same_bytes_however_they_come_in_batches(
    tokenizer, tmp_path, packing
):
    rows = numbered(300)
    options = {"layout": Layout(LENGTH, packing=packing), "validation_fraction": 0.1, "seed": 5}
    build([rows], tokenizer, TextFormat(tokenizer), output=tmp_path / "one", **options)
    build(
        [rows[:7], rows[7:200], rows[200:]],
        tokenizer,
        TextFormat(tokenizer),
        output=tmp_path / "two",
        **options,
    )
    files = [
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*")}
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 6


def test_other_rows_give_another_fingerprint(tokenizer, tmp_path):
    for name, rows in (("one", numbered(5)), ("two", numbered(6))):
        build([rows], tokenizer, TextFormat(tokenizer), output=tmp_path / name, layout=Layout(400))
    assert (tmp_path / "one/train/state.json").read_bytes() != (
        tmp_path / "two/train/state.json"
    ).read_bytes()


def test_the_collector_of_cycles_runs_again_afterwards(tokenizer, tmp_path):
    build([numbered(3)], tokenizer, TextFormat(tokenizer), output=tmp_path, layout=Layout(400))
    assert gc.isenabled()


def test_nothing_held_out_leaves_no_validation_folder(tokenizer, tmp_path):
    account = build(
        [numbered(3)],
        tokenizer,
        TextFormat(tokenizer),
        output=tmp_path,
        layout=Layout(400),
        validation_fraction=0.0,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    assert account.validation == SplitAccount()


def test_a_single_row_is_kept_for_training(tokenizer, tmp_path):
    account = build(
        [numbered(1)],
        tokenizer,
        TextFormat(tokenizer),
        output=tmp_path,
        layout=Layout(400),
        validation_fraction=0.5,
    )
    assert (account.train.documents, account.validation.documents) == (1, 0)


def test_equal_rows_are_counted_and_stay_on_one_side(tokenizer, tmp_path):
    account = build(
        [numbered(30) * 3],
        tokenizer,
        TextFormat(tokenizer),
        output=tmp_path,
        layout=Layout(LENGTH),
        validation_fraction=0.2,
    )
    train, validation = (
        {tuple(piece) for piece in pieces(read(tmp_path / split))}
        for split in ("train", "validation")
    )
    assert account.duplicate == 60
    assert not {piece for piece in train & validation if piece[0] != tokenizer.pad}
    assert account.validation.documents == 18


def test_rows_without_instruction_or_response_are_left_out_and_counted(tokenizer, tmp_path):
    rows = as_rows([("the cat", "", "sat"), (" ", "", "sat"), ("the cat", "", "\n\t")])
    account = build([rows], tokenizer, TextFormat(tokenizer), output=tmp_path, layout=Layout(400))
    assert (account.rows_in, account.empty, account.train.documents) == (3, 2, 1)


LONG = as_rows(
    [("the cat", "", "sat on the mat"), ("the cat", "", "sat " * 100), ("cat " * 100, "", "sat")]
)


@pytest.mark.parametrize(
    "overlong, loss_on, over_long, dropped, kept",
    [
        ("truncate", "all", 2, 0, 3),
        ("truncate", "response", 2, 1, 2),
        ("drop", "all", 2, 2, 1),
        ("drop", "response", 2, 2, 1),
    ],
)
def test_over_long_documents_are_cut_or_dropped_and_every_token_of_them_counted(
    tokenizer, tmp_path, overlong, loss_on, over_long, dropped, kept
):
    """A document cut within its prompt has nothing to learn from when the loss is on the response:
    it is dropped."""
    account = build(
        [LONG],
        tokenizer,
        TextFormat(tokenizer),
        output=tmp_path,
        layout=Layout(LENGTH, overlong=overlong, loss_on=loss_on),
    )
    assert (account.over_long, account.dropped, account.train.documents) == (
        over_long,
        dropped,
        kept,
    )
    lengths = [len(ids) for ids, _ in documents(LONG, tokenizer)]
    assert account.tokens_in == sum(lengths)
    assert account.cut_tokens + account.dropped_tokens == account.tokens_in - account.train.packed
    assert account.train.packed == sum(sorted(min(length, LENGTH) for length in lengths)[:kept])


def test_a_cut_document_keeps_its_beginning(tokenizer, tmp_path):
    build([LONG[1:2]], tokenizer, TextFormat(tokenizer), output=tmp_path, layout=Layout(LENGTH))
    assert (
        read(tmp_path / "train")[0]["input_ids"] == documents(LONG[1:2], tokenizer)[0][0][:LENGTH]
    )


def test_a_prompt_cut_by_concat_is_masked_in_both_rows(tokenizer, tmp_path):
    rows = LONG[2:]
    build(
        [rows],
        tokenizer,
        TextFormat(tokenizer),
        output=tmp_path,
        layout=Layout(LENGTH, packing="concat", loss_on="response"),
    )
    [(ids, prompt)] = documents(rows, tokenizer)
    labels = list(chain.from_iterable(row["labels"] for row in read(tmp_path / "train")))
    assert prompt > LENGTH
    assert labels == ([-100] * prompt + ids[prompt:])[: len(labels)]


@pytest.mark.parametrize(
    "rows, layout, fraction, told",
    [
        (
            LONG,
            Layout(LENGTH, overlong="error"),
            0.0,
            "2 of 3 documents are longer than MAX_LENGTH=48",
        ),
        (LONG[1:], Layout(LENGTH, overlong="drop"), 0.0, "no document remains. Raise MAX_LENGTH"),
        (
            as_rows([("", "", "x"), ("x", "", " ")]),
            Layout(LENGTH),
            0.0,
            "None of the 2 examples has both",
        ),
        (
            LONG[:1],
            Layout(400, packing="concat"),
            0.0,
            "fewer than one sequence of 400. Lower MAX_LENGTH or set PACKING=best_fit",
        ),
        (
            numbered(30),
            Layout(200, packing="concat"),
            0.02,
            "documents for validation have .* VALIDATION_FRACTION=0",
        ),
    ],
)
def test_what_leaves_nothing_to_train_on_is_refused_with_numbers_and_a_remedy(
    tokenizer, tmp_path, rows, layout, fraction, told
):
    with pytest.raises(InputError, match=told):
        build(
            [rows],
            tokenizer,
            TextFormat(tokenizer),
            output=tmp_path,
            layout=layout,
            validation_fraction=fraction,
        )


def test_a_full_disk_is_told_before_anything_is_written(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100})())
    with pytest.raises(
        StageFailure, match=r"has room for 100 B, and 4\.8 kB are needed for the sequences"
    ):
        build([numbered(2)], tokenizer, TextFormat(tokenizer), output=tmp_path, layout=Layout(400))
    assert not list(tmp_path.rglob("*.arrow"))


def test_the_sample_is_a_training_document_that_the_seed_chooses(tokenizer, tmp_path):
    samples = {
        seed: build(
            [numbered(20)],
            tokenizer,
            TextFormat(tokenizer),
            output=tmp_path / str(seed),
            layout=Layout(400),
            validation_fraction=0.5,
            seed=seed,
        ).sample
        for seed in range(6)
    }
    assert len(set(samples.values())) > 1
    for seed, sample in samples.items():
        assert sample in {f"{dolly(*texts_of(row))}<|end|>" for row in numbered(20)}
        trained = [
            tokenizer.decode(piece) for piece in pieces(read(tmp_path / str(seed) / "train"))
        ]
        assert sample.removesuffix("<|end|>") in trained


BALANCED = Accounting(
    max_length=10,
    rows_in=4,
    empty=1,
    tokens_in=17,
    over_long=1,
    dropped=1,
    dropped_tokens=11,
    train=SplitAccount(documents=2, documents_tokens=6, rows=1, packed=6, padded=4, supervised=3),
)


def test_accounts_that_balance_are_accepted():
    BALANCED.check()


@pytest.mark.parametrize(
    "field", ["rows_in", "empty", "tokens_in", "dropped", "cut_tokens", "dropped_tokens"]
)
def test_a_row_or_token_that_is_lost_stops_the_stage(field):
    with pytest.raises(StageFailure, match="do not balance"):
        replace(BALANCED, **{field: getattr(BALANCED, field) + 1}).check()


@pytest.mark.parametrize(
    "field", ["documents", "documents_tokens", "left_over", "rows", "packed", "padded"]
)
def test_a_token_that_is_lost_within_a_split_stops_the_stage(field):
    with pytest.raises(StageFailure, match="do not balance"):
        replace(
            BALANCED, train=replace(BALANCED.train, **{field: getattr(BALANCED.train, field) + 1})
        ).check()


def test_the_table_fits_a_screen_and_shows_every_count():
    table = BALANCED.table()
    assert len(table.splitlines()) <= 24
    assert max(map(len, table.splitlines())) <= 120
    assert "60.00% full" in table


def test_the_manifests_figures_are_plain_numbers_without_the_sample():
    figures = replace(BALANCED, sample="text").figures()
    assert figures["train"]["packed"] == 6
    assert figures["fill"] == 0.6
    assert "sample" not in figures
