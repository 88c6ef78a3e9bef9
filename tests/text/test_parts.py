"""Datasets in many files: which of a folder's files are read, and in which order."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.run.errors import InputError
from stages.run.provenance import provenance_now
from stages.run.settings import Settings
from stages.text.examples import open_examples
from stages.text.parts import parts_of
from tests.text.test_examples import GOOD, message, texts


def rows(*responses: object) -> list[dict[str, str]]:
    return [{**GOOD, "response": str(response)} for response in responses]


def write(folder: Path, files: dict[str, list[dict[str, str]]]) -> None:
    """Each file with its rows, in the format of its name."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in content).encode()
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(content), path)
        else:
            path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)


def test_a_folder_as_on_the_hub_is_read_by_its_split_in_the_order_of_names(tmp_path):
    parts = {
        "data/train-00001-of-00002.parquet": rows(2, 3),
        "data/train-00000-of-00002.parquet": rows(0, 1),
        "data/test-00000-of-00001.parquet": rows(9),
    }
    write(tmp_path, parts)
    (tmp_path / "README.md").write_text("---\n")
    (tmp_path / "rows.py").write_text("raise SystemExit('code of a dataset')")
    assert [row[2] for row in texts(tmp_path)] == ["0", "1", "2", "3"]
    said = "\n".join(open_examples(str(tmp_path)).read_as)
    assert "split 'train': 2 files" in said and "data/train-00000-of-00002.parquet" in said
    assert "not read: test (1 file), README.md, rows.py" in said
    assert [row[2] for row in texts(tmp_path, split="test")] == ["9"]
    assert "no files of the split 'dev'; by their names it has test, train" in message(
        tmp_path, split="dev"
    )


def test_parts_without_a_splits_name_are_all_read(tmp_path):
    write(tmp_path, {"part-0.jsonl": rows(0), "part-1.jsonl.gz": rows(1), ".hidden.json": rows(9)})
    assert [row[2] for row in texts(tmp_path)] == ["0", "1"]


def test_a_bad_row_is_named_by_the_part_that_holds_it(tmp_path):
    write(tmp_path, {"a.jsonl": rows(0, 1), "b.jsonl": [*rows(2), {"instruction": "x"}]})
    assert "b.jsonl, line 2, column 'response' is missing" in message(tmp_path)
    write(tmp_path, {"c.jsonl.gz": rows(0)})
    (tmp_path / "c.jsonl.gz").write_bytes(b"\x1f\x8b")
    assert "cut off or damaged" in message(tmp_path)


def test_parts_in_two_formats_or_dialects_are_refused(tmp_path):
    write(tmp_path, {"a.jsonl": rows(0), "a.parquet": rows(0)})
    assert "several formats: .jsonl, .parquet" in message(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "a.csv").write_text("instruction,context,response\na,b,c\n")
    (tmp_path / "b.csv").write_text("instruction;context;response\na;b;c\n")
    assert "b.csv is written in another way than" in message(tmp_path)


def test_a_part_that_is_missing_is_named(tmp_path):
    write(tmp_path, {f"data/train-0000{n}-of-00004.parquet": rows(n) for n in (0, 3)})
    assert "2 of 4 parts are missing: data/train-00001-of-00004 is the first" in message(tmp_path)


def test_a_change_of_any_part_makes_the_data_stage_stale(tmp_path):
    def digest() -> str:
        settings = Settings(dataset=str(tmp_path))
        return provenance_now("data", settings, {}, None)[0]["settings"]["DATASET"]

    write(tmp_path, {"a.jsonl": rows(0), "b.jsonl": rows(1)})
    before = digest()
    write(tmp_path, {"b.jsonl": rows(2)})
    changed = digest()
    write(tmp_path, {"c.jsonl": rows(3)})
    assert len({before, changed, digest()}) == 3


@pytest.mark.torture("data")
def test_a_link_among_the_parts_may_not_lead_out_of_the_folder(tmp_path):
    write(tmp_path, {"in/a.jsonl": rows(0), "out.jsonl": rows(1)})
    (tmp_path / "in" / "b.jsonl").symlink_to(tmp_path / "out.jsonl")
    assert "outside its folder" in message(tmp_path / "in")


SPLITS = {
    # names: {split: how many are chosen}
    ("train.csv", "valid.csv", "test.csv"): {"train": 1, "validation": 1, "val": 1, "test": 1},
    ("train/0.csv", "train/1.csv", "dev/0.csv"): {"train": 2, "validation": 1, "dev": 1},
    ("data/train_sft-00000-of-00001.csv", "data/train_gen-00000-of-00001.csv"): {"train_sft": 1},
    ("latest.csv", "contrast.csv"): {"train": 2},
    ("my_train.csv", "notes.csv"): {"train": 1},
    ("part-00000-of-00002.csv", "part-00001-of-00002.csv", "dataset_infos.json"): {"train": 2},
    ("default/train/0000.csv", "default/test/0000.csv"): {"train": 1, "test": 1},
}


@pytest.mark.parametrize("names", SPLITS, ids=lambda names: names[0])
def test_the_split_of_a_file_is_the_word_in_its_name(names):
    for split, count in SPLITS[names].items():
        assert len(parts_of("d", names, split)[0]) == count


@pytest.mark.parametrize("split", ["", "../x", "test"])
def test_a_split_that_no_name_has_is_refused(split):
    with pytest.raises(InputError, match="no files of the split"):
        parts_of("d", ["a.csv"], split)
