"""S3 on loopback: moto's server after a door that misbehaves when told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.moto_api._internal import moto_api_backend
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

FOR_EVER = 10**9
# Answers of S3 that are not its own: status, code and what S3 says with it.
ERRORS = {
    "denied": ("403 Forbidden", "AccessDenied", "Access Denied"),
    "unknown key": (
        "403 Forbidden",
        "InvalidAccessKeyId",
        "The AWS Access Key Id you provided does not exist in our records.",
    ),
    "wrong secret": (
        "403 Forbidden",
        "SignatureDoesNotMatch",
        "The request signature we calculated does not match.",
    ),
    "expired": ("400 Bad Request", "ExpiredToken", "The provided token has expired."),
    "slow down": ("503 Service Unavailable", "SlowDown", "Please reduce your request rate."),
    "internal": (
        "500 Internal Server Error",
        "InternalError",
        "We encountered an internal error. Please try again.",
    ),
    "elsewhere": (
        "301 Moved Permanently",
        "PermanentRedirect",
        "The bucket must be addressed using another endpoint.",
    ),
}


class Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        """Nothing: the tests say what went wrong."""


class Door:
    """A WSGI application before moto's: what was put with `misbehave` happens to the next requests
    for objects."""

    def __init__(self) -> None:
        self.s3 = DomainDispatcherApplication(create_backend_app)
        self.faults: list[list[Any]] = []
        self.requests: list[str] = []
        self.stall = 30.0
        self.lock = threading.Lock()

    def misbehave(self, where: str, name: str, times: int = 1) -> None:
        self.faults.append([where, name, times])

    def fault_of(self, request: str) -> str:
        with self.lock:
            for fault in self.faults:
                if fault[0] in request and fault[2] > 0:
                    fault[2] -= 1
                    return fault[1]
        return ""

    def __call__(self, environ: dict, start_response: Any) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        self.requests.append(request)
        fault = self.fault_of(request)
        if fault in ERRORS:
            status, code, message = ERRORS[fault]
            error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
            content = f"<?xml version='1.0'?>{error}".encode()
            region = [("x-amz-bucket-region", "eu-west-3")] if fault == "elsewhere" else []
            start_response(
                status,
                [
                    ("Content-Type", "application/xml"),
                    ("Content-Length", str(len(content))),
                    *region,
                ],
            )
            return [content] if environ["REQUEST_METHOD"] != "HEAD" else []
        if fault == "stall":
            time.sleep(self.stall)
        return (
            self.shortened(self.s3(environ, start_response))
            if fault == "cut"
            else self.s3(environ, start_response)
        )

    def shortened(self, body: Iterable[bytes]) -> Iterator[bytes]:
        """The first half of an answer, whose Content-Length reports the whole."""
        content = b"".join(body)
        yield content[: len(content) // 2]
        raise ConnectionResetError("cut by the test")


@contextmanager
def running() -> Iterator[tuple[Door, str]]:
    """The door and its address."""
    moto_api_backend.reset()  # objects of an earlier server of this process
    door = Door()
    server = make_server("127.0.0.1", 0, door, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield door, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
