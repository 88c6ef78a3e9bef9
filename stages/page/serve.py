"""Serve the page of a run on this machine's loopback address, made again when its files change."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from stages.page.facts import facts_of
from stages.page.render import render
from stages.run.errors import InputError
from stages.run.settings import Settings

HOST = "127.0.0.1"
READ = ("*/manifest.json", "*/*.jsonl", ".work/train-*/metrics.jsonl")  # of the run's folder


class Page:
    """The page about the run in `folder`, as it is when it is asked for."""

    def __init__(self, folder: Path, settings: Settings):
        self._folder, self._settings = folder, settings
        self._nonce = secrets.token_urlsafe(16)
        self._drawn_of, self._page = [("", 0, 0)], b""
        self._lock = Lock()

    def now(self) -> bytes:
        with self._lock:
            if (files := self._files()) != self._drawn_of:
                facts = facts_of(self._folder, self._settings)
                self._page = render(facts, self._nonce).encode()
                self._drawn_of = files
            return self._page

    def _files(self) -> list[tuple[str, int, int]]:
        """Name, size and time of each file that the page is about."""
        found = []
        for pattern in READ:
            for path in self._folder.glob(pattern):
                try:
                    seen = os.stat(path)
                except FileNotFoundError:  # published or removed meanwhile
                    continue
                found.append((str(path), seen.st_size, seen.st_mtime_ns))
        return sorted(found)


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
