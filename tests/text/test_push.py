"""PUSH_DATASET: the packed sequences arrive whole in S3 and on the Hub (loopback), once; what goes
wrong is said with the remedy, and nothing that was published is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.data import pack
from stages.make.stale import stale_stages
from stages.run.errors import InputError, StageFailure
from stages.run.manifest import manifest_of
from stages.run.publish import publish
from stages.run.push_target import check_push_target, overwrites, reason_to_push
from stages.run.settings import Settings
from stages.text import remote_sources
from stages.text.examples import open_examples
from stages.text.push import push
from tests.conftest import ROOT, Project
from tests.fakes import hub as hubs
from tests.fakes import s3
from tests.fakes.hub import FOR_EVER, Hub, closed_port
from tests.fakes.s3 import Door
from tests.model.ask_hub import Asker

SETTINGS = Settings(
    model_id=str(ROOT / "data/demo/model"),
    dataset=str(ROOT / "data/demo/demo.jsonl"),
    prompts=str(ROOT / "data/demo/prompts.jsonl"),
    max_length=128,
    inference_sequence_length=256,
    init_weights="random",
    validation_fraction=0.2,
)
TARGET = "s3://bucket/runs/packed"


def publish_data(output: Path, settings: Settings = SETTINGS) -> Path:
    publish("data", settings, {}, output, lambda work: pack(settings, work))
    return output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_data(tmp_path_factory.mktemp("run") / "data")


@pytest.fixture
def data(made: Path) -> Iterator[Path]:
    """What the data stage published, pushed nowhere yet."""
    yield made
    (made.parent / ".pushed.json").unlink(missing_ok=True)


def rows_of(data: Path, split: str) -> list[dict]:
    with pa.memory_map(str(data / split / "data-00000-of-00001.arrow")) as file:
        return pa.ipc.open_stream(file).read_all().to_pylist()


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    with s3.running() as (door, address):
        environment = {
            "AWS_ACCESS_KEY_ID": "AKIACANARY",
            "AWS_SECRET_ACCESS_KEY": "secretcanary",
            "AWS_ENDPOINT_URL": address,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3", endpoint_url=address).create_bucket(Bucket="bucket")
        door.requests.clear()
        yield door


def stored(tmp_path: Path) -> Path:
    """What is in the bucket, copied to a folder."""
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for one in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        (tmp_path / one["Key"]).parent.mkdir(parents=True, exist_ok=True)
        client.download_file("bucket", one["Key"], str(tmp_path / one["Key"]))
    return tmp_path


def test_s3_gets_a_saved_dataset_with_every_sequence(
    door: Door, data: Path, tmp_path: Path
) -> None:
    from datasets import load_from_disk

    push(TARGET, data)
    loaded = load_from_disk(str(stored(tmp_path) / "runs/packed"))
    assert list(loaded) == ["train", "validation"]
    for split in loaded:
        assert loaded[split].to_list() == rows_of(data, split)
    assert not any(request.startswith("DELETE") for request in door.requests)


def test_sequences_are_no_dataset_to_tokenise_again(door: Door, data: Path) -> None:
    push(TARGET, data)
    with pytest.raises(InputError, match="holds packed sequences"):
        open_examples(TARGET)


def test_the_same_sequences_are_pushed_once_and_others_or_elsewhere_again(
    door: Door, data: Path, tmp_path: Path
) -> None:
    def requests(target: str, folder: Path) -> int:
        door.requests.clear()
        push(target, folder)
        return len(door.requests)

    assert requests(TARGET, data)
    assert not requests(TARGET, data)
    assert not requests(f"{TARGET}/", data)
    assert requests("s3://bucket/elsewhere", data)
    own = tmp_path / "run" / "data"
    push(TARGET, publish_data(own))
    other = Settings(**{**vars(SETTINGS), "max_length": 64})
    assert requests(TARGET, publish_data(own, other))


def test_pushing_changes_nothing_that_a_stage_reads(door: Door, data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    content = manifest_of(data)
    push(TARGET, data)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    assert manifest_of(data) == content


def test_make_runs_data_to_push_and_nothing_after_it(door: Door, data: Path) -> None:
    def stale(settings: Settings) -> dict[str, list[str]]:
        return stale_stages({"data": []}, data.parent, settings)

    pushing = Settings(**{**vars(SETTINGS), "push_dataset": TARGET})
    assert stale(SETTINGS) == {}
    assert stale(pushing) == {"data": [f"PUSH_DATASET={TARGET} does not have these sequences yet"]}
    push(TARGET, data)
    assert stale(pushing) == {}


WORDS = {
    "denied": "the right s3:PutObject",
    "unknown key": "AWS_ACCESS_KEY_ID",
    "expired": "AWS_SESSION_TOKEN",
    "elsewhere": "Set AWS_REGION",
}


@pytest.mark.parametrize("fault", WORDS)
def test_a_refusal_of_s3_names_the_remedy_and_no_key_and_the_next_call_pushes(
    door: Door, data: Path, fault: str
) -> None:
    door.misbehave("bucket", fault, FOR_EVER)
    with pytest.raises(StageFailure) as failed:
        push(TARGET, data)
    told = str(failed.value)
    assert told.startswith(f"PUSH_DATASET={TARGET} cannot be written") and WORDS[fault] in told
    assert "canary" not in told.lower()
    assert "pushes them again, without tokenising" in told
    assert reason_to_push(TARGET, data)
    door.faults.clear()
    push(TARGET, data)
    assert not reason_to_push(TARGET, data)


@pytest.mark.parametrize("before", [False, True])
def test_a_push_that_is_cut_off_leaves_no_mixture(
    door: Door, data: Path, tmp_path: Path, before: bool
) -> None:
    if before:
        push(TARGET, data)
        (data.parent / ".pushed.json").unlink()
    door.misbehave("validation/data-", "denied", FOR_EVER)
    with pytest.raises(StageFailure):
        push(TARGET, data)
    door.faults.clear()
    described = (stored(tmp_path) / "runs/packed/dataset_dict.json").read_text()
    assert json.loads(described) == {"splits": []}


def test_a_missing_bucket_and_a_missing_server_are_told(
    door: Door, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StageFailure, match="The bucket does not exist"):
        push("s3://nowhere/packed", data)
    monkeypatch.setattr(remote_sources, "_TRIES", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(StageFailure, match="Check the network and AWS_ENDPOINT_URL"):
        push(TARGET, data)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hubs.running(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="module")
def asker(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    with Asker(hub.address, tmp_path_factory.mktemp("cache")) as asker:
        yield asker


def test_the_hub_gets_a_private_dataset_with_every_sequence_once(
    hub: Hub, asker: Asker, data: Path
) -> None:
    answer = asker.push("owner/packed", data)
    assert not answer.error
    assert "data: pushed train, validation to owner/packed" in answer.printed
    assert "owner/packed" in hub.private
    for split in ("train", "validation"):
        [file] = (hub.folder / "datasets/owner/packed/data").glob(f"{split}-*.parquet")
        assert pq.read_table(file).to_pylist() == rows_of(data, split)
    hub.requests.clear()
    assert not asker.push("owner/packed", data).error
    assert not hub.requests


def test_a_public_dataset_gets_nothing(hub: Hub, asker: Asker, data: Path) -> None:
    name = hub.add_rows(["a"])
    hub.requests.clear()
    error = asker.push(name, data).error
    assert f"PUSH_DATASET={name} is public on the Hub" in error
    assert not hub.asked("commit") and not hub.asked("PUT")


REFUSED = {
    # the Hub's answer: where, and words of the message
    "forbidden": ("repos/create", "a token with the right to write"),
    "not signed in": ("", "does not know the token (401)"),
    "broken": ("/commit/", "out of order (500)"),
    "closed": ("preupload", "cannot be reached"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_refusal_of_the_hub_names_the_remedy_and_the_next_call_pushes(
    hub: Hub, asker: Asker, data: Path, fault: str
) -> None:
    where, words = REFUSED[fault]
    name = f"owner/refused-{fault.replace(' ', '-')}"
    hub.misbehave(where, fault, FOR_EVER)
    error = asker.push(name, data).error
    hub.faults.clear()
    assert error.startswith(f"PUSH_DATASET={name}") and words in error, error
    assert "hf_canary" not in error and "pushes them again" in error
    assert not asker.push(name, data).error
    assert name in hub.private


@pytest.mark.parametrize(
    "text", ["", "s3://bucket/prefix", "s3://my.bucket/a/b_c/d=1/", "owner/name", "o/n.v2-x"]
)
def test_a_place_for_sequences_is_a_prefix_in_s3_or_a_dataset_of_an_owner(text: str) -> None:
    check_push_target(text)


@pytest.mark.parametrize(
    "text",
    [
        *("s3://bucket", "s3://bucket/", "s3://b/x", "s3://bucket/../x", "s3://bucket//x", "s3:/a"),
        *("name", "a/b/c", "./folder", "/tmp/folder", "owner/--x", "owner/x..y", "owner/x."),
        *("https://huggingface.co/owner/name", "owner/a b", "owner/ä"),
    ],
)
def test_no_other_place_is_accepted(text: str) -> None:
    with pytest.raises(InputError, match=r"PUSH_DATASET: .*OWNER/NAME"):
        Settings.read({"PUSH_DATASET": text})


def test_a_key_in_the_place_is_not_printed() -> None:
    with pytest.raises(InputError) as refused:
        Settings.read({"PUSH_DATASET": "s3://AKIACANARY:secretcanary@bucket/prefix"})
    assert "holds no credentials" in str(refused.value)
    assert "canary" not in str(refused.value).lower()


def test_the_dataset_itself_is_no_place_for_its_sequences() -> None:
    assert overwrites("s3://bucket/a", "s3://bucket/a/rows.jsonl")
    assert overwrites("s3://bucket/a/packed", "s3://bucket/a/")
    assert not overwrites("s3://bucket/ab", "s3://bucket/a")
    with pytest.raises(InputError, match="would overwrite DATASET=owner/Rows"):
        Settings.read({"DATASET": "owner/Rows", "PUSH_DATASET": "owner/rows"})


@pytest.mark.slow
def test_make_data_fails_when_the_push_does_and_pushes_again_without_tokenising(
    door: Door, built: Project
) -> None:
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    arguments = ["data", "RECIPE=tiny", f"PUSH_DATASET={TARGET}"]
    door.misbehave("bucket", "denied", FOR_EVER)
    before = built.manifest("data")
    failed = built.make(*arguments, check=False, **environment)
    assert failed.returncode == 2 and "failed: PUSH_DATASET=" in failed.stderr
    door.faults.clear()
    done = built.make(*arguments, **environment)
    assert "data: up to date" in done.stdout and f"to {TARGET}" in done.stdout
    assert built.manifest("data") == before
    assert "Nothing to be done" in built.make(*arguments, **environment).stdout
    assert json.loads((built.folder / "outputs/tiny/.pushed.json").read_text())["target"] == TARGET
