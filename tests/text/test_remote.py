"""S3 and the Hub, played by a small server of the tests' own on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.run.errors import InputError
from stages.text.rows import read_rows

ROWS = [{"instruction": "Why?", "context": "", "response": str(number)} for number in range(2_500)]
# What the Hub answers for a repository, by its owner: status and the header in which it says why.
REFUSALS = {
    "gated": (403, "GatedRepo"),
    "forbidden": (403, ""),
    "missing": (401, "RepoNotFound"),
    "unknown": (404, "RepoNotFound"),
    "limited": (429, ""),
    "broken": (503, ""),
}


class Server(ThreadingHTTPServer):
    """Serves `folder` as S3 serves objects, and refuses what is asked of the Hub; counts requests per repository."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked = folder, Counter[str]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if owner := next((part for part in path.split("/") if part in REFUSALS), None):
            self.server.asked[owner] += 1
            status, reason = REFUSALS[owner]
            return self.answer(status, b"{}", **({"X-Error-Code": reason} if reason else {}))
        file = self.server.folder / path.lstrip("/")
        if not file.is_file():
            return self.answer(404, b"<Error><Code>NoSuchKey</Code><Message>no</Message></Error>")
        content = file.read_bytes()
        begin, end = 0, len(content) - 1
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            begin, end = int(first), min(int(last or end), end)
        headers = {"Content-Range": f"bytes {begin}-{end}/{len(content)}", "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
        self.answer(206 if "Range" in self.headers else 200, content[begin : end + 1], **headers)

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: the tests say what went wrong."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(tmp_path) as running:
        environment = {
            "AWS_ENDPOINT_URL": running.address,
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
            "AWS_REGION": "us-east-1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield running
        running.shutdown()


def responses(dataset: str) -> list[int]:
    return [int(row.response) for batch in read_rows(dataset) for row in batch]


def test_files_and_saved_datasets_on_s3_are_read_like_local_ones(server):
    from datasets import Dataset

    bucket = server.folder / "bucket"
    Dataset.from_list(ROWS).save_to_disk(bucket / "saved", num_shards=2)
    (bucket / "d.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    pq.write_table(pa.Table.from_pylist(ROWS), bucket / "d.parquet")
    assert all(responses(f"s3://bucket/{name}") == list(range(2_500)) for name in ("d.jsonl", "d.parquet", "saved", "saved/"))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.parquet"])
def test_what_is_not_on_s3_is_refused_by_name(server, name):
    with pytest.raises(InputError, match=f"s3://bucket/{name} does not exist"):
        responses(f"s3://bucket/{name}")


def hub_messages(endpoint: str, cache: Path, kind: str, names: list[str]) -> dict[str, str]:
    """The refusals of a fresh process: the Hub's library reads its address once, when it is imported."""
    read = "list(read_rows(name))" if kind == "dataset" else "find_tokenizer(name)"
    code = f"""
import json
from stages.run.errors import InputError
from stages.model import hub
from stages.text.rows import read_rows
from stages.text.tokens import find_tokenizer
hub.PAUSES = (0.0, 0.0)
told = {{}}
for name in {names!r}:
    try:
        {read}
    except InputError as error:
        told[name] = str(error)
print(json.dumps(told))
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AWS_"))}
    environment = {**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_canary"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


WORDS = {
    "gated": ["is gated", "Accept its licence", "HF_TOKEN"],
    "forbidden": ["403", "HF_TOKEN"],
    "missing": ["no such {kind}", "Check the name"],
    "unknown": ["no such {kind}", "Check the name"],
    "limited": ["429", "Wait some minutes"],
    "broken": ["out of order (503)", "later"],
}


@pytest.mark.parametrize("kind, setting", [("dataset", "DATASET"), ("model", "MODEL_ID")])
def test_what_the_hub_refuses_is_told_with_the_remedy_and_without_the_token(server, tmp_path, kind, setting):
    # `datasets` itself waits 23 seconds for a server that is out of order.
    owners = [owner for owner in REFUSALS if (kind, owner) != ("dataset", "broken")]
    told = hub_messages(server.address, tmp_path / "cache", kind, [f"{owner}/it" for owner in owners])
    for owner in owners:
        words, text = WORDS[owner], told[f"{owner}/it"]
        assert text.startswith(f"{setting}={owner}/it"), text
        assert all(word.format(kind=kind) in text for word in words), text
        assert "canary" not in text


def test_only_what_may_pass_by_itself_is_asked_for_again(server, tmp_path):
    hub_messages(server.address, tmp_path / "cache", "model", ["gated/it", "broken/it"])
    assert server.asked["gated"] == 1
    assert server.asked["broken"] >= 3


def test_an_unreachable_hub_is_told_with_what_to_check(tmp_path):
    told = hub_messages("http://127.0.0.1:9", tmp_path / "cache", "model", ["owner/it"])
    assert "cannot be reached" in told["owner/it"]
