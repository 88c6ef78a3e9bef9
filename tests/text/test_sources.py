"""Odd but lawful data through the real `make data`: what is left out, cut or kept is counted in the
manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stages.text.tokens import TextTokenizer
from tests.conftest import Project, copy_project
from tests.text import conftest as kinds

pytestmark = pytest.mark.torture("data")

SHORT = {"instruction": "Why?", "context": "", "response": "Because."}
LONG = {**SHORT, "response": "because " * 100}
TURNS = ("user", "assistant", "user")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose data stage runs again and again."""
    return copy_project(tmp_path_factory.mktemp("data") / "project")


def make_data(
    project: Project, rows: list[dict[str, Any]], *settings: str, check: bool = True
) -> tuple[dict[str, Any], str]:
    """The figures in the manifest, and what was said on stderr."""
    (project.folder / "data/tiny/rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    done = project.make(
        "data",
        "RECIPE=tiny",
        "INIT_WEIGHTS=random",
        "VALIDATION_FRACTION=0",
        *settings,
        check=check,
    )
    assert "Traceback" not in done.stderr
    return (
        project.manifest("data")["metrics"] if check else {"status": done.returncode}
    ), done.stderr


def written(project: Project, split: str = "train") -> list[dict[str, list[int]]]:
    with pa.memory_map(
        str(project.folder / f"outputs/tiny/data/{split}/data-00000-of-00001.arrow")
    ) as file:
        return pa.ipc.open_stream(file).read_all().to_pylist()


COUNTED: dict[str, tuple[list[dict[str, Any]], list[str], dict[str, Any]]] = {
    # rows, settings, what the manifest counts
    "one row, half of it held out": (
        [SHORT],
        ["VALIDATION_FRACTION=0.5"],
        {"rows_in": 1, "train.documents": 1, "validation.rows": 0},
    ),
    "empty rows": (
        [SHORT, {**SHORT, "response": " \n"}, {**SHORT, "instruction": ""}],
        [],
        {"rows_in": 3, "empty": 2},
    ),
    "duplicates": ([SHORT] * 5, [], {"rows_in": 5, "duplicate": 4, "train.documents": 5}),
    "duplicates, and a part held out": (
        [SHORT] * 5,
        ["VALIDATION_FRACTION=0.5"],
        {"duplicate": 4, "train.documents": 5},
    ),
    "all rows too long, cut": (
        [LONG] * 3,
        [],
        {"over_long": 3, "dropped": 0, "train.documents": 3, "train.packed": 3 * 64},
    ),
    "all rows but one too long, dropped": (
        [SHORT, LONG, LONG],
        ["OVERLONG=drop"],
        {"over_long": 2, "dropped": 2, "train.documents": 1},
    ),
    "rows too long, joined": (
        [LONG] * 3,
        ["PACKING=concat"],
        {"over_long": 3, "dropped": 0, "cut_tokens": 0, "train.padded": 0},
    ),
    "a response that begins with white space": (
        [{**SHORT, "response": "\n\n x"}],
        [],
        {"rows_in": 1, "train.documents": 1},
    ),
    "a conversation that ends with a question": (
        [{"messages": [{"role": role, "content": "Why?"} for role in TURNS]}],
        [],
        {
            **{"rows_in": 1, "train.documents": 1, "unanswered": 1},
            **{"columns": "conversations in 'messages'", "prompt_format": "dolly"},
        },
    ),
    "texts without a prompt": (
        [{"text": "the cat sat"}],
        [],
        {
            "columns": "texts without a prompt in 'text'",
            "prompt_format": "text without a prompt",
        },
    ),
    "extra columns": ([{**SHORT, "score": "3"}], [], {"rows_in": 1, "train.documents": 1}),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_becomes_of_odd_rows_is_counted_in_the_manifest(own: Project, name: str) -> None:
    rows, settings, expected = COUNTED[name]
    figures, _ = make_data(own, rows, *settings)
    flat = figures | {
        f"{split}.{key}": value
        for split in ("train", "validation")
        for key, value in figures[split].items()
    }
    assert {key: flat[key] for key in expected} == expected
    assert (
        figures["rows_in"]
        == figures["empty"]
        + figures["dropped"]
        + figures["train"]["documents"]
        + figures["validation"]["documents"]
    )
    kept = figures["train"]["documents_tokens"] + figures["validation"]["documents_tokens"]
    assert figures["tokens_in"] == figures["cut_tokens"] + figures["dropped_tokens"] + kept
    assert len(written(own)) == figures["train"]["rows"]


REFUSED = {
    "nothing left": (
        [LONG] * 3,
        ["OVERLONG=drop"],
        "3 of 3 documents are longer than MAX_LENGTH=64, the longest",
    ),
    "too long, which is to be an error": (
        [SHORT, LONG],
        ["OVERLONG=error"],
        "1 of 2 documents are longer than MAX_LENGTH=64",
    ),
    "cut within every prompt": (
        [{**LONG, "instruction": "why " * 100}],
        ["LOSS_ON=response"],
        "1 of 1 documents are longer than MAX_LENGTH=64",
    ),
    "nothing but empty rows": (
        [{**SHORT, "response": ""}] * 2,
        [],
        "None of the 2 examples has both an instruction and a response",
    ),
    "not enough for a row": (
        [SHORT],
        ["PACKING=concat", "MAX_LENGTH=512"],
        "fewer than one sequence of 512",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_leave_nothing_to_learn_are_refused_and_the_former_rows_stay(
    own: Project, name: str
) -> None:
    rows, settings, told = REFUSED[name]
    make_data(own, [SHORT])
    before = written(own)
    outcome, said = make_data(own, rows, *settings, check=False)
    assert outcome["status"] == 2 and told in said
    assert written(own) == before


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_control_tokens_spelt_in_a_text_are_text(own: Project, kind: str) -> None:
    """As the models' tokenizers are: </s> in a row is four characters, and an answer still ends
    once."""
    model = kinds.MAKERS[kind](own.folder / "data" / kind)
    spelt = ["</s>", "<s>", "[INST]", "<|end|>", "<|pad|>", "<unk>", "</s></s>", "<s> </s>"]
    rows = [
        {"instruction": f"the {text} cat", "context": text, "response": f"{text} sat {text}"}
        for text in spelt
    ]
    lengths = ("MAX_LENGTH=512", "INFERENCE_SEQUENCE_LENGTH=512")
    figures, _ = make_data(own, rows, f"MODEL_ID=data/{kind}", *lengths)
    assert figures["rows_in"] == figures["train"]["documents"] == len(spelt)
    tokenizer = TextTokenizer.load(Path(model))
    ids = [
        id
        for row in written(own)
        for id, label in zip(row["input_ids"], row["labels"], strict=True)
        if label != -100
    ]
    controls = [id for id in ids if id in tokenizer.controls]
    assert controls == [*tokenizer.bos, tokenizer.eos] * len(spelt)
    if kind in ("byte_level", "llama"):  # the others cannot write every character
        text = tokenizer.decode(ids)
        assert all(text.count(row["response"]) >= 1 for row in rows)


def test_the_demos_own_tokenizer_takes_them_for_text_too(own: Project) -> None:
    rows = [
        {"instruction": "</s>", "context": "<s>", "response": f"[INST] </s> {number}"}
        for number in range(3)
    ]
    figures, _ = make_data(own, rows)
    tokenizer = TextTokenizer.load(own.folder / "data/tiny")
    ids = [
        id
        for row in written(own)
        for id, label in zip(row["input_ids"], row["labels"], strict=True)
        if label != -100
    ]
    assert sum(id == tokenizer.eos for id in ids) == figures["train"]["documents"] == 3
