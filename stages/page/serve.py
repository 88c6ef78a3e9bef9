"""Serve the page of a run on this machine's loopback address, made again when there is news."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from stages.page.facts import Facts, facts_of
from stages.page.render import render
from stages.run.errors import InputError
from stages.run.settings import Settings

HOST = "127.0.0.1"


class Page:
    """The page about the run in `folder`, as it is when it is asked for."""

    def __init__(self, folder: Path, settings: Settings):
        self._folder, self._settings = folder, settings
        self._nonce = secrets.token_urlsafe(16)
        self._facts: Facts | None = None
        self._page = b""
        self._lock = Lock()

    def now(self) -> bytes:
        with self._lock:
            if (facts := facts_of(self._folder, self._settings)) != self._facts:
                self._facts, self._page = facts, render(facts, self._nonce).encode()
            return self._page


def server_of(page: Page, port: int) -> ThreadingHTTPServer:
    """A server of `page` on `port`; raises InputError where it cannot listen."""
    try:
        return ThreadingHTTPServer((HOST, port), _handler(page.now))
    except OSError as error:
        raise InputError(
            f"WATCH_PORT={port} of {HOST} cannot be listened on: {error.strerror}. Set another."
        ) from None


def _handler(now: Callable[[], bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of the network whose name leads here must not read this one (DNS rebinding).
            name = self.headers.get("Host", "").rpartition(":")[0]
            if name not in (HOST, "localhost"):
                self.send_error(403)
                return
            if self.path != "/":
                self.send_error(404)
                return
            page = now()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            with suppress(ConnectionError):  # a tab that was closed meanwhile
                self.end_headers()
                self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a line for each look would fill the terminal."""

    return Handler
