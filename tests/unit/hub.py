"""A Hugging Face hub on the loopback interface that serves one data set's files."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `files` (path: content) as data set `name`; `requests` are those that came."""

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        self.name, self.files = name, files
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {self.path}")
        parts = path.strip("/").split("/")
        if parts[0] == "api" and "/".join(parts[2:4]) == self.server.name:
            self._api(parts[4:])
        elif parts[0] == "datasets" and "/".join(parts[1:3]) == self.server.name:
            self._file("/".join(parts[5:]))
        else:
            self._reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_GET = do_HEAD = do_POST = _any

    def _api(self, rest: list[str]) -> None:
        entries = [
            {"type": "file", "path": name, "size": len(of), "oid": hashlib.sha1(of).hexdigest()}
            for name, of in self.server.files.items()
        ]
        folders = sorted({name.rpartition("/")[0] for name in self.server.files if "/" in name})
        entries += [{"type": "directory", "path": f, "size": 0, "oid": SHA} for f in folders]
        if rest[:1] == ["tree"]:
            under = "/".join(rest[2:])
            self._json([e for e in entries if e["path"].startswith(f"{under}/" if under else "")])
        elif rest[:1] == ["paths-info"]:
            self._json(entries)
        elif not rest or rest[0] == "revision":
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json(
                {"id": self.server.name, "sha": SHA, "siblings": siblings, "private": False, "tags": []}
            )
        else:
            self._reply(404, b"")

    def _file(self, name: str) -> None:
        content = self.server.files.get(name)
        if content is None:
            return self._reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        tag = hashlib.sha1(content).hexdigest()
        self._reply(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": SHA, "Accept-Ranges": "none"})

    def _json(self, value: Any) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass
