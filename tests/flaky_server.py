"""A server on this machine that gives files, and fails as servers on the way do: slow, cut short, busy."""

import base64
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FlakyServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        files: path -> content.
        faults: path -> what the next requests of the file's content meet: "503" or another status, "drop", "truncate",
            "damage", "slow".
        requests: how often each file's whole content was requested. ranges: the same of a part of it.
        tags: path -> ETag. times: path -> Last-Modified. digests: path -> MD5 in base64.
        password: "user:password" that requests must have; empty: none.
        knows_ranges: whether parts are given; else the whole file is.
        delay: seconds before each reply.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.ranges: Counter[str] = Counter()
        self.tags: dict[str, str] = {}
        self.times: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        self.password = ""
        self.knows_ranges = True
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Quiet: dropped connections are the point."""


class _Handler(BaseHTTPRequestHandler):
    server: FlakyServer

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._reply(401 if self._is_stranger() else 200 if self.path in self.server.files else 404)

    def do_GET(self) -> None:
        time.sleep(self.server.delay)
        part = self.headers["Range"] if self.server.knows_ranges else None
        (self.server.requests if part is None else self.server.ranges)[self.path] += 1
        faults = self.server.faults.get(self.path, [])
        fault = faults.pop(0) if faults else ""
        content = self.server.files.get(self.path, b"")
        if self._is_stranger():
            self._reply(401)
        elif fault == "drop":
            self.connection.close()
        elif fault.isdigit() or self.path not in self.server.files:
            self._reply(int(fault or 404))
        elif part is not None:
            start, end = (int(number) for number in part.removeprefix("bytes=").split("-"))
            self._reply(206, content[start : end + 1])
            self.wfile.write(content[start : end + 1])
        elif fault == "damage":
            self._reply(200)
            self.wfile.write(bytes(len(content)))
        elif fault == "truncate":
            self._reply(200)
            self.wfile.write(content[: len(content) // 2])
        else:
            self._reply(200)
            for start in range(0, len(content), 1024):
                time.sleep(0.01 if fault == "slow" else 0)
                self.wfile.write(content[start : start + 1024])

    def _is_stranger(self) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Basic ")
        return bool(self.server.password) and base64.b64decode(given).decode() != self.server.password

    def _reply(self, status: int, part: bytes | None = None) -> None:
        content = self.server.files.get(self.path, b"") if part is None else part
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if status < 300 else 0))
        if part is not None:
            self.send_header("Content-Range", f"bytes */{len(self.server.files[self.path])}")
        server = self.server
        for name, values in (("ETag", server.tags), ("Last-Modified", server.times), ("Content-MD5", server.digests)):
            if self.path in values:
                self.send_header(name, values[self.path])
        self.end_headers()


@contextmanager
def flaky_server() -> Iterator[FlakyServer]:
    """A running server."""
    with FlakyServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
