"""Datasets that `datasets` saved: read across their files, and never beyond their folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.text.test_examples import GOOD, message, texts


def save(folder: Path, splits: dict[str, int] | None) -> Path:
    """A dataset saved by `datasets` itself, 1,500 rows in two files, or one with splits."""
    from datasets import Dataset, DatasetDict

    def rows(count: int) -> Dataset:
        return Dataset.from_list(
            [{**GOOD, "response": str(number), "extra": 1} for number in range(count)]
        )

    if splits is None:
        rows(1500).save_to_disk(folder, num_shards=2)
    else:
        DatasetDict({name: rows(count) for name, count in splits.items()}).save_to_disk(folder)
    return folder


def test_a_saved_dataset_is_read_across_its_files_in_order(tmp_path):
    assert [int(row[2]) for row in texts(save(tmp_path / "saved", None))] == list(range(1500))


def test_one_split_of_a_saved_dataset_is_read(tmp_path):
    save(tmp_path / "saved", {"train": 3, "test": 2})
    assert len(texts(tmp_path / "saved", split="test")) == 2
    assert "no split 'dev'; it has train, test" in message(tmp_path / "saved", split="dev")


def test_a_saved_dataset_that_is_not_whole_or_points_elsewhere_is_refused(tmp_path):
    folder = save(tmp_path / "saved", None)
    state = (folder / "state.json").read_text()
    (folder / "state.json").write_text(state.replace('"data-', '"../data-'))
    assert "outside its folder" in message(folder)
    (folder / "state.json").write_text("{}")
    assert "not what `datasets` writes" in message(folder)
    (folder / "state.json").write_text(state)
    [*_, last] = sorted(folder.glob("*.arrow"))
    last.write_bytes(last.read_bytes()[:5000])
    assert "damaged" in message(folder)
    last.unlink()
    assert f"{last.name} is missing" in message(folder)


STATES = [
    "[" * 100_000,
    '{"_data_files": 3}',
    '{"_data_files": [null]}',
    '{"_data_files": [{"filename": 3}]}',
    "\0",
]


@pytest.mark.torture("data")
@pytest.mark.parametrize("name", ["../x.arrow", "/etc/passwd", "..", ".", "", "a/b", "a\0b"])
def test_a_saved_dataset_may_not_name_files_outside_its_folder(tmp_path, name):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    assert "names data files outside its folder" in message(tmp_path)


@pytest.mark.torture("data")
@pytest.mark.parametrize("split", ["../elsewhere", "..", "/", "a/../../b"])
def test_a_split_may_not_lie_outside_a_saved_dataset(tmp_path, split):
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
    assert "no split" in message(tmp_path, split=split)


@pytest.mark.torture("data")
@pytest.mark.parametrize("linked", ["data-00000-of-00002.arrow", "state.json"])
def test_a_link_in_a_saved_dataset_may_not_lead_out_of_it(tmp_path, linked):
    folder = save(tmp_path / "saved", None)
    (folder / linked).rename(tmp_path / linked)
    (folder / linked).symlink_to(tmp_path / linked)
    assert f"{linked} is a link to a file outside its folder" in message(folder)


@pytest.mark.torture("data")
def test_a_saved_dataset_of_devices_and_pipes_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "state.json")
    assert "state.json is not a file" in message(tmp_path)


@pytest.mark.torture("data")
@pytest.mark.parametrize("state", STATES, ids=lambda state: repr(state[:40]))
def test_a_state_that_datasets_never_writes_is_refused(tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    assert "state.json" in message(tmp_path)
