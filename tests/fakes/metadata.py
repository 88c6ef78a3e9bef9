"""EC2's instance metadata service on loopback, as far as spot instances ask it (IMDSv2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "a token"


@contextmanager
def metadata_service(taken_at: str) -> Iterator[str]:
    """Its address. `taken_at` is when the instance is taken away; empty: it is not."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            known = self.path == "/latest/api/token"
            self.answer(TOKEN if known else "", 200 if known else 404)

        def do_GET(self) -> None:
            if self.headers["X-aws-ec2-metadata-token"] != TOKEN:
                self.answer("", 401)
            elif taken_at and self.path == "/latest/meta-data/spot/instance-action":
                self.answer(f'{{"action": "terminate", "time": "{taken_at}"}}')
            else:
                self.answer("", 404)

        def answer(self, text: str, status: int = 200) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
