"""A Hugging Face Hub of the tests' own, on loopback, that misbehaves when told to.

It serves folders as models and datasets (`folder/models/OWNER/NAME`, `folder/datasets/OWNER/NAME`):
their listings, and their files with digests, commits and ranges. What a request gets instead is put
beforehand with `misbehave`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.conftest import ROOT
from tests.fakes import hub_uploads

FOR_EVER = 10**9
# Refusals by name: status and headers.
REFUSALS: dict[str, tuple[int, dict[str, str]]] = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}),
    "gated, not signed in": (401, {"X-Error-Code": "GatedRepo"}),
    "forbidden": (403, {}),
    "not signed in": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "missing": (401, {"X-Error-Code": "RepoNotFound"}),
    "unknown": (404, {"X-Error-Code": "RepoNotFound"}),
    "no revision": (404, {"X-Error-Code": "RevisionNotFound"}),
    "limited": (429, {}),
    "limited, wait 2": (429, {"Retry-After": "2"}),
    "limited, wait 3000": (429, {"Retry-After": "3000"}),
    "limited, window 3": (429, {"RateLimit": '"resolvers";r=0;t=3'}),
    "broken": (500, {}),
    "bad gateway": (502, {}),
    "out of order": (503, {}),
}
# What else may happen to a request: no answer, or half of one, or another than the Hub's.
FAULTS = ("closed", "stall", "cut", "short", "shrunk", "dribble", "html", "wrong json", "loop")


@dataclass
class Fault:
    """`name` happens to the next `times` requests whose method and path hold `where`: of REFUSALS,
    of FAULTS, or another server's address, to which files are redirected."""

    where: str
    name: str
    times: int


@dataclass
class Request:
    method: str
    path: str
    range: str
    authorized: bool


class Hub(ThreadingHTTPServer):
    """Serves `folder`; `requests` is what was asked of it, `stall` how many seconds a stalled
    request is held."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.requests, self.stall = folder, list[Request](), 30.0
        self.faults: list[Fault] = []
        self.private, self.large_files = set[str](), dict[str, bytes]()
        self.account: dict = {"name": "owner", "orgs": [], "auth": {"accessToken": {}}}
        self._lock, self._numbers = threading.Lock(), itertools.count()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def misbehave(self, where: str, name: str, times: int = 1) -> None:
        self.faults.append(Fault(where, name, times))

    def fault_of(self, request: str) -> str:
        """The name of what is to happen to this request, "" for free."""
        with self._lock:
            for fault in self.faults:
                if fault.where in request and fault.times > 0:
                    fault.times -= 1
                    return fault.name
        return ""

    def asked(self, text: str) -> int:
        """How many requests held `text` in their method and path."""
        return sum(text in f"{request.method} {request.path}" for request in self.requests)

    def add_model(self, weights: int = 200_000) -> str:
        """A new model of the Hub: the demo's description, and `weights` random bytes for weights.
        Returns its name."""
        name = f"owner/model{next(self._numbers)}"
        shutil.copytree(ROOT / "data" / "demo" / "model", self.folder / "models" / name)
        (self.folder / "models" / name / "model.safetensors").write_bytes(os.urandom(weights))
        return name

    def add_rows(self, responses: Iterable[str]) -> str:
        """A new dataset of the Hub with a row for each response. Returns its name."""
        name = f"owner/rows{next(self._numbers)}"
        self.change_rows(name, responses)
        return name

    def change_rows(self, name: str, responses: Iterable[str]) -> None:
        folder = self.folder / "datasets" / name
        folder.mkdir(parents=True, exist_ok=True)
        rows = (
            {"instruction": "Why?", "context": "", "response": response} for response in responses
        )
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def commit_of(self, name: str, kind: str = "models") -> str:
        return Repository(self.folder / kind / name, name).commit

    def handle_error(self, *_: object) -> None:
        """Nothing: a client that goes away is what the tests are about."""


@contextmanager
def running(folder: Path, port: int = 0) -> Iterator[Hub]:
    with Hub(folder, port) as hub:
        try:
            yield hub
        finally:
            hub.shutdown()


def closed_port() -> int:
    """A port of loopback on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass(frozen=True)
class Repository:
    """A folder as a repository with one branch, `main`, whose commit is its content."""

    folder: Path
    name: str
    commit: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1()
        for name, path in self.files().items():
            digest.update(f"{name} {digest_of(name, path)}".encode())
        object.__setattr__(self, "commit", digest.hexdigest())

    def files(self) -> dict[str, Path]:
        return {
            str(path.relative_to(self.folder)): path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }

    def info(self) -> dict:
        siblings = [{"rfilename": name} for name in self.files()]
        return {
            "id": self.name,
            "sha": self.commit,
            "siblings": siblings,
            "private": False,
            "gated": False,
            "tags": [],
            "downloads": 0,
        }

    def entry(self, name: str) -> dict:
        path = self.folder / name
        return {
            "type": "file",
            "path": name,
            "oid": digest_of(name, path),
            "size": path.stat().st_size,
        }


def digest_of(name: str, path: Path) -> str:
    """What the Hub names a file's content by: SHA-256 of large files, git's digest of others."""
    return _digest(path, path.stat().st_mtime_ns, name.endswith((".safetensors", ".parquet")))


@functools.cache
def _digest(path: Path, _changed: int, large: bool) -> str:
    content = path.read_bytes()
    return (
        hashlib.sha256(content).hexdigest()
        if large
        else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.handle_request({})

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.headers.get("Content-Type", "")
        if "ndjson" in kind:
            form = {}
        elif "form" in kind:
            form = parse_qs(self.body.decode())
        else:
            form = json.loads(self.body or b"{}")
        self.handle_request(form)

    def do_PUT(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.handle_request({})

    def handle_request(self, form: dict) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(
            Request(
                self.command, path, self.headers.get("Range", ""), "Authorization" in self.headers
            )
        )
        self.fault = self.server.fault_of(f"{self.command} {path}")
        if self.fault in REFUSALS:
            status, headers = REFUSALS[self.fault]
            return self.answer(status, b"{}", **headers)
        if not self.misbehaves() and not self.take(path, form):
            self.serve(path, form)

    def take(self, path: str, form: dict) -> bool:
        """Whether the request was one of those that write."""
        hub, name = self.server, "/".join(path.split("/")[3:5])
        if path == "/api/repos/create":
            try:
                status, made = 200, hub_uploads.create_repository(hub.folder, hub.private, form)
            except FileExistsError as exists:
                status, made = 409, str(exists)
            url = f"{hub.address}/{made.removeprefix('models/')}"
            self.answer(status, json.dumps({"url": url}).encode())
        elif path == "/api/whoami-v2":
            self.answer_json(hub.account)
        elif path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif self.command == "POST" and "/preupload/" in path:
            self.answer_json(hub_uploads.upload_modes(form))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.answer_json(hub_uploads.upload_places(hub.address, form, hub.large_files))
        elif self.command == "PUT":
            right = hub_uploads.keep(hub.large_files, path.rpartition("/")[2], self.body)
            self.answer(200 if right else 400, b"{}")
        elif self.command == "POST" and "/commit/" in path:
            kind = path.split("/")[2]
            hub_uploads.commit(hub.folder / kind / name, hub.large_files, self.body)
            oid = hub.commit_of(name, kind)
            self.answer_json({"commitUrl": f"{hub.address}/{name}/commit/{oid}", "commitOid": oid})
        else:
            return False
        return True

    def misbehaves(self) -> bool:
        """Whether something else than an answer was given."""
        if self.fault == "closed":
            self.drop()
        elif self.fault == "stall":
            time.sleep(self.server.stall)
            self.drop()
        elif self.fault == "html":
            self.answer(
                200,
                b"<html><body>Sign in to this network</body></html>",
                **{"Content-Type": "text/html"},
            )
        elif self.fault == "wrong json":
            self.answer(200, b'{"sha": 7, "siblings":', **{"Content-Type": "application/json"})
        elif self.fault == "loop":
            self.answer(302, b"", Location=self.path)
        else:
            return False
        return True

    def serve(self, path: str, form: dict) -> None:
        api = path.startswith("/api/")
        parts = path.removeprefix("/api/").strip("/").split("/")
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        owner, name, *rest = [*parts, "", ""]
        folder = self.server.folder / kind / owner / name
        if not (owner and name and folder.is_dir()):
            return self.refuse("unknown")
        repository = Repository(folder, f"{owner}/{name}")
        verb, revision, *below = [*(part for part in rest if part), "", ""]
        if revision not in ("", "main", repository.commit):
            return self.refuse("no revision")
        names = repository.files()
        if not api and verb == "resolve":
            return self.send_file(repository, "/".join(part for part in below if part))
        if verb in ("", "revision"):
            private = repository.name in self.server.private
            return self.answer_json({**repository.info(), "private": private})
        if verb == "tree":
            below_it = "/".join(part for part in below if part)
            found = [name for name in names if not below_it or name.startswith(f"{below_it}/")]
            if below_it and not found:
                return self.answer(404, b"{}", **{"X-Error-Code": "EntryNotFound"})
            return self.answer_json([repository.entry(name) for name in found])
        if verb == "paths-info":
            return self.answer_json(
                [repository.entry(name) for name in form.get("paths", []) if name in names]
            )
        self.answer(404, b"{}", **{"X-Error-Code": "EntryNotFound"})

    def send_file(self, repository: Repository, name: str) -> None:
        commit = {"X-Repo-Commit": repository.commit}
        if name not in repository.files():
            return self.answer(404, b"{}", **commit, **{"X-Error-Code": "EntryNotFound"})
        path = repository.folder / name
        content = path.read_bytes()
        headers = {"ETag": f'"{digest_of(name, path)}"', **commit, "Accept-Ranges": "bytes"}
        if self.fault.startswith("http://"):  # where the Hub keeps large files
            linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
            return self.answer(302, b"", **commit, **linked, Location=self.fault + self.path)
        if "Range" not in self.headers:
            return self.answer(200, content, **headers)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        begin, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
        if begin > end:
            return self.answer(416, b"", **{"Content-Range": f"bytes */{len(content)}"})
        self.answer(
            206,
            content[begin : end + 1],
            **headers,
            **{"Content-Range": f"bytes {begin}-{end}/{len(content)}"},
        )

    def refuse(self, name: str) -> None:
        status, headers = REFUSALS[name]
        self.answer(status, b"{}", **headers)

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        sent = (
            content[: len(content) // 2]
            if self.fault in ("cut", "short", "shrunk", "dribble")
            else content
        )
        told = sent if self.fault == "shrunk" and self.command != "HEAD" else content
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(told))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(sent)
        self.wfile.flush()
        if self.fault == "dribble":
            time.sleep(self.server.stall)
        if len(sent) < len(told):
            self.drop(reset=self.fault == "cut")

    def drop(self, reset: bool = True) -> None:
        """End the connection, by a reset or in good order."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.rfile.close()
            self.wfile.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Nothing: the tests say what went wrong."""
