"""A stand-in for the Hugging Face hub on the loopback: repositories in memory, with the endpoints that brixel's use needs."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"
"""Of every commit."""


class Hub:
    """What was asked, and what lies on it.

    Attributes:
        token: that may write.
        files: contents by repository and name.
        asked: (method, path) of each request.
        refuse: whether every request to write is refused.
    """

    def __init__(self, token: str) -> None:
        self.token, self.refuse = token, False
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[tuple[str, str]] = []
        self.url = ""


@contextmanager
def hub(token: str = "hf_secret") -> Iterator[Hub]:
    """The hub while the context lasts; its `url` is for HF_ENDPOINT."""
    state = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Not to stderr."""

    def reply(
        self, status: int, value: Any = None, headers: dict[str, str] | None = None, content: bytes | None = None
    ) -> None:
        body = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        for name, text in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        state, path = self.state, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        state.asked.append(("POST", path))
        if state.refuse or self.headers.get("Authorization") != f"Bearer {state.token}":
            self.reply(401, {"error": "Invalid username or password."}, {"X-Error-Message": "Invalid user token."})
        elif path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(part for part in (request.get("organization"), request["name"]) if part)
            state.files.setdefault(name, {})
            self.reply(200, {"url": f"{state.url}/{name}", "id": name})
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            self.reply(
                200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        elif path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    state.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply(
                200,
                {"success": True, "commitOid": SHA, "commitUrl": f"{state.url}/{name}/commit/{SHA}", "hookOutput": ""},
            )
        else:
            self.reply(200, {})  # the check of a card's front matter

    def do_GET(self) -> None:
        state, path = self.state, self.path.partition("?")[0]
        state.asked.append((self.command, path))
        if path.startswith("/api/models/"):  # earlier clients ask how large files are stored
            self.reply(200, {"id": path.removeprefix("/api/models/").partition("/revision/")[0], "xetEnabled": False})
            return
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        content = state.files.get(name, {}).get(file)
        if content is None or revision not in ("main", "v2", SHA):
            code = "EntryNotFound" if name in state.files else "RepoNotFound"
            self.reply(404, {"error": "not found"}, {"X-Error-Code": code})
            return
        digest = hashlib.sha256(content).hexdigest()
        self.reply(200, headers={"ETag": f'"{digest}"', "X-Repo-Commit": SHA}, content=content)

    do_HEAD = do_GET  # noqa: N815 (named by http.server)
