"""`make audit` against a small OSV server on loopback: what it asks for, what it says, and what is
not a pass."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import pytest

from tests import audit
from tests.conftest import ROOT, Project


class Osv(ThreadingHTTPServer):
    """Knows what it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.known: dict[audit.Pin, str] = {}
        self.asked: set[audit.Pin] = set()
        self.status = 200
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1/query"


class Answer(BaseHTTPRequestHandler):
    server: Osv

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pin = question["package"]["name"], question["version"]
        self.server.asked.add(pin)
        answer = {}
        if pin in self.server.known:
            fixed = [
                {
                    "type": "ECOSYSTEM",
                    "events": [{"introduced": "0"}, {"fixed": self.server.known[pin]}],
                }
            ]
            affected = [{"package": {"name": pin[0], "ecosystem": "PyPI"}, "ranges": fixed}]
            answer = {"vulns": [{"id": "PYSEC-2026-1", "summary": "bad", "affected": affected}]}
        content = json.dumps(answer).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def osv(monkeypatch: pytest.MonkeyPatch) -> Iterator[Osv]:
    """The server; audit asks it alone, and of two versions of one package and one of AWS's."""
    with Osv() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(audit, "OSV", server.url)
        monkeypatch.setattr(
            audit,
            "pins",
            lambda _: {
                ("click", "8.5.1"): ["stages/requirements.txt"],
                ("neuronx-cc", "2.1"): ["docker"],
            },
        )
        monkeypatch.setattr(audit, "installed", lambda: {("click", "8.0.0"): [audit.INSTALLED]})
        yield server
        server.shutdown()


def test_make_audit_asks_for_every_pin_and_all_that_is_installed_and_tells_what_is_known(
    project: Project,
) -> None:
    with Osv() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.known = {("torch", "2.8.0"): "2.8.1", ("pytest", version("pytest")): "99"}
        done = project.make("audit", check=False, PIP_AUDIT_OSV_URL=server.url)
        server.shutdown()
    assert done.returncode == 2 and "Error 1" in done.stderr  # make's own status, and the program's
    pinned = {
        ("torch", "2.8.0"),
        ("numpy", "1.26.4"),
        ("numpy", "2.2.6"),
        ("jupyterlab", "4.6.6"),
        ("optimum-neuron", "0.4.5"),
    }
    assert pinned | {("pip", version("pip"))} <= server.asked
    assert not {name for name, _ in server.asked} & audit.AWS
    lines = [line.split() for line in done.stdout.splitlines() if "PYSEC" in line]
    assert lines == [
        [
            "pytest",
            version("pytest"),
            "PYSEC-2026-1",
            "fixed",
            "in",
            "99",
            "tests/requirements.txt,",
            "installed",
            "here",
        ],
        ["torch", "2.8.0", "PYSEC-2026-1", "fixed", "in", "2.8.1", "docker/requirements.txt"],
    ]
    assert f"{len(server.asked)} versions checked, something is known of 2." in done.stdout


def test_nothing_known_passes_and_names_what_was_not_checked(
    osv: Osv, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main() == 0
    assert osv.asked == {("click", "8.5.1"), ("click", "8.0.0")}
    said = capsys.readouterr().out
    assert "2 versions checked, something is known of 0." in said and "neuronx-cc 2.1" in said


@pytest.mark.parametrize("fault", ["unreachable", "503"])
def test_without_an_answer_nothing_was_checked_which_is_not_a_pass(
    osv: Osv, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    osv.status = 503
    if fault == "unreachable":
        osv.server_close()
    assert audit.main() == 2
    assert "nothing was checked" in capsys.readouterr().err


def test_every_list_of_requirements_is_audited() -> None:
    files = {
        str(path.relative_to(ROOT))
        for folder in ("docker", "stages", "tests")
        for path in (ROOT / folder).rglob("*requirements.txt")
    }
    assert files | {"requirements.txt"} == set(audit.REQUIREMENTS)
