"""A server on this machine that takes and gives files as the Hugging Face hub does, as far as its client asks."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LoopbackHub(ThreadingHTTPServer):
    """The server; ``repos`` maps the name of a repository to its files."""

    repos: dict[str, dict[str, bytes]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def commit_of(files: dict[str, bytes]) -> str:
    """A name of the version of a repository: it changes with its content."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackHub

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _reply(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: object) -> None:
        self._reply(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("authorization") != "Bearer good":
            self._reply(401, b"{}")
        elif self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made.get('organization') or 'me'}/{made['name']}"
            self.server.repos.setdefault(name, {})
            self._json({"url": f"{self.server.url}/{name}"})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._json({"files": modes})
        else:
            self._commit("/".join(self.path.split("/")[3:5]), body)

    def _commit(self, name: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.repos[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        commit = commit_of(self.server.repos[name])
        self._json({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})

    def do_GET(self) -> None:
        name, _, rest = self.path.strip("/").partition("/resolve/")
        repo = self.server.repos.get(name)
        content = None if repo is None else repo.get(rest.partition("/")[2])
        if repo is None:
            self._reply(404, X_Error_Code="RepoNotFound")
        elif content is None:
            self._reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit_of(repo))
        else:
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            self._reply(200, content, ETag=tag, X_Repo_Commit=commit_of(repo))

    do_HEAD = do_GET  # noqa: N815, the name is given


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """Run the server until the block ends."""
    server = LoopbackHub(("127.0.0.1", 0), _Handler)
    server.repos = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
