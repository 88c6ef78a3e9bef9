"""Datasets on S3 (moto's server, on loopback): read like local ones, and refused in clear words
within a bounded time."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.run.errors import InputError
from stages.text import remote_sources
from tests.fakes import s3
from tests.fakes.hub import closed_port
from tests.fakes.s3 import FOR_EVER, Door
from tests.text.conversations import read, texts_of

pytestmark = pytest.mark.torture("network")

NUMBERS = list(range(20_000))  # more than one buffer of the reader, and more than one request
ROWS = [{"instruction": "Why?", "context": "", "response": str(number)} for number in NUMBERS]
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIACANARY",
    "AWS_SECRET_ACCESS_KEY": "secretcanary",
    "AWS_SESSION_TOKEN": "tokencanary",
}
FILES = ["rows.jsonl", "rows.parquet", "saved", "parts"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, str]]:
    """The door and its address; after it s3://bucket holds ROWS in each of FILES."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("bucket")
    Dataset.from_list(ROWS).save_to_disk(folder / "saved", num_shards=2)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    (folder / "parts").mkdir()
    for number, part in enumerate((ROWS[:9_000], ROWS[9_000:])):
        lines = "\n".join(map(json.dumps, part)).encode()
        (folder / "parts" / f"train-0000{number}-of-00002.jsonl.gz").write_bytes(
            gzip.compress(lines)
        )
    (folder / "parts" / "test.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with s3.running() as (door, address):
        client = boto3.client(
            "s3",
            endpoint_url=address,
            region_name="us-east-1",
            aws_access_key_id="k",
            aws_secret_access_key="s",
        )
        client.create_bucket(Bucket="bucket")
        for path in filter(Path.is_file, folder.rglob("*")):
            client.upload_file(str(path), "bucket", str(path.relative_to(folder)))
        yield door, address


@pytest.fixture
def door(served: tuple[Door, str], monkeypatch: pytest.MonkeyPatch) -> Door:
    door, address = served
    settings = {
        **CREDENTIALS,
        "AWS_ENDPOINT_URL": address,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    door.faults.clear()
    door.requests.clear()
    return door


def responses(dataset: str) -> list[int]:
    return [int(texts_of(row)[2]) for row in read(dataset)]


def refusal(dataset: str) -> str:
    with pytest.raises(InputError) as refused:
        responses(dataset)
    told = str(refused.value)
    assert told.startswith(dataset) and "canary" not in told.lower(), told
    return told


@pytest.mark.parametrize("name", [*FILES, "saved/"])
def test_files_and_saved_datasets_on_s3_are_read_like_local_ones(door, name):
    assert responses(f"s3://bucket/{name}") == NUMBERS


@pytest.mark.parametrize(
    "dataset",
    ["s3://bucket/nowhere.jsonl", "s3://bucket/nowhere.parquet", "s3://nowhere/rows.jsonl"],
)
def test_what_is_not_on_s3_is_refused_by_name(door, dataset):
    assert f"{dataset} does not exist. Check the bucket and the key." in refusal(dataset)


# What S3 says -> the remedy.
WORDS = {
    "denied": "AWS_ACCESS_KEY_ID",
    "unknown key": "AWS_ACCESS_KEY_ID",
    "wrong secret": "AWS_SECRET_ACCESS_KEY",
    "expired": "AWS_SESSION_TOKEN",
    "elsewhere": "Set AWS_REGION",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("error", WORDS)
def test_what_waiting_does_not_help_is_refused_at_once_with_the_remedy_and_without_the_keys(
    door, error, name
):
    door.misbehave("bucket", error, FOR_EVER)
    assert WORDS[error] in refusal(f"s3://bucket/{name}")
    assert len(door.requests) == 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["slow down", "internal", "cut"])
def test_what_passes_is_tried_again_and_the_content_is_right(door, fault, name):
    door.misbehave("GET" if fault == "cut" else "bucket", fault)
    assert responses(f"s3://bucket/{name}") == NUMBERS


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "fault, words",
    [("slow down", "asked for fewer"), ("internal", "S3 failed"), ("cut", "network")],
)
def test_what_lasts_ends_after_a_few_tries(door, monkeypatch, fault, words, name):
    monkeypatch.setattr(remote_sources, "_TRIES", 2)
    door.misbehave("GET" if fault == "cut" else "bucket", fault, FOR_EVER)
    assert words in refusal(f"s3://bucket/{name}")
    assert len(door.requests) <= 8


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("whole", [1, 2])
def test_what_is_lost_after_the_first_requests_gives_no_part_of_the_rows(door, name, whole):
    door.misbehave("GET", "", whole)
    door.misbehave("GET", "denied", FOR_EVER)
    try:
        assert responses(f"s3://bucket/{name}") == NUMBERS  # no more was to be asked for
    except InputError as error:
        assert str(error).startswith(f"s3://bucket/{name}") and "canary" not in str(error).lower()


def test_a_server_that_falls_silent_ends_by_a_time_limit(door, monkeypatch):
    monkeypatch.setattr(remote_sources, "_TRIES", 2)
    monkeypatch.setattr(remote_sources, "_LONGEST_SILENCE", 1)
    door.misbehave("GET", "stall", FOR_EVER)
    assert "Check the network and AWS_ENDPOINT_URL" in refusal("s3://bucket/rows.jsonl")


def test_an_unreachable_server_is_told_with_what_to_check(door, monkeypatch):
    monkeypatch.setattr(remote_sources, "_TRIES", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port()}")
    assert "Check the network and AWS_ENDPOINT_URL" in refusal("s3://bucket/rows.jsonl")


def test_without_credentials_the_refusal_names_them(door, monkeypatch, tmp_path):
    for name in [
        name
        for name in os.environ
        if name.startswith("AWS_") and name not in ("AWS_ENDPOINT_URL", "AWS_EC2_METADATA_DISABLED")
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    door.misbehave("bucket", "denied", FOR_EVER)
    assert "AWS_ACCESS_KEY_ID" in refusal("s3://bucket/rows.jsonl")


def test_whatever_happens_in_whatever_order_the_rows_are_right_or_there_is_a_clear_error(
    door, torture
):
    for _ in range(torture.times(3, 30)):
        door.faults.clear()
        name = torture.random.choice(FILES)
        for fault in torture.random.choices([*s3.ERRORS, "cut"], k=torture.random.randint(1, 2)):
            door.misbehave(
                torture.random.choice(["GET", "HEAD", "bucket"]),
                fault,
                torture.random.randint(1, 2),
            )
            door.misbehave("bucket", "", torture.random.randint(0, 3))
        told: Any = ""
        for _ in range(10):
            try:
                assert responses(f"s3://bucket/{name}") == NUMBERS
                break
            except InputError as error:
                told = str(error)
                assert told.startswith(f"s3://bucket/{name}") and "canary" not in told.lower(), told
        else:
            raise AssertionError(f"seed {torture.seed}: {told}")
        torture.count()
