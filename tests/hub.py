"""A small server that speaks as much of the Hub's protocol as the real client needs and writes down what it is sent."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.mentalglm_jax.endpoint import Server

SHA = "0123456789abcdef" * 2 + "01234567"


@dataclass
class Hub:
    """``requests``: method, path and body of each. ``repositories``: name to whether it is private. ``files``: what a
    repository holds; ``datasets``: what a data set holds. ``refuses``: start of "METHOD path" to the status of the
    answer."""

    url: str = ""
    requests: list[tuple[str, str, bytes]] = field(default_factory=list)
    repositories: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    datasets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refuses: dict[str, int] = field(default_factory=dict)

    def sent(self, method: str, path: str) -> list[Any]:
        """The JSON bodies of the requests whose path begins so."""
        return [json.loads(body) for how, where, body in self.requests if how == method and where.startswith(path)]

    def serve(self, repository: str, directory: Path) -> None:
        """Puts the files of a directory into a repository."""
        self.repositories[repository] = True
        self.files[repository] = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        path = path.partition("?")[0]
        for start, status in self.refuses.items():
            if f"{method} {path}".startswith(start):
                return status, b'{"error": "refused by the test"}', {}
        if path == "/api/whoami-v2":
            return 200, b'{"name": "someone", "type": "user"}', {}
        if path == "/api/validate-yaml":
            ModelCard(json.loads(body)["content"])
            return 200, b'{"errors": [], "warnings": []}', {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, asked.get("visibility") == "private")
            return 200, json.dumps({"url": f"{self.url}/{name}", "name": name}).encode(), {}
        parts = path.removeprefix("/api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if path.startswith("/api/models/") and name in self.repositories:
            return 200, json.dumps(self._model(name, rest, body)).encode(), {}
        if "/datasets/" in path:
            return self._data_set(path)
        if path.startswith("/api/"):
            return 404, b'{"error": "not found"}', {"X-Error-Code": "RepoNotFound"}
        owner, repository, *where = path[1:].split("/")
        found = self.files.get(f"{owner}/{repository}", {}).get(where[-1] if where[:1] == ["resolve"] else "")
        headers = {"X-Repo-Commit": SHA}
        if found is not None:
            return 200, found, {**headers, "ETag": f'"{hashlib.sha1(found).hexdigest()}"'}
        return 404, b'{"error": "not found"}', {**headers, "X-Error-Code": "EntryNotFound"}

    def _data_set(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        parts = path.removeprefix("/api").removeprefix("/datasets/").split("/")
        name, how, place = "/".join(parts[:2]), parts[2:3], "/".join(parts[4:])
        headers = {"X-Repo-Commit": SHA}
        if (held := self.datasets.get(name)) is None:
            return 404, b'{"error": "not found"}', {**headers, "X-Error-Code": "RepoNotFound"}
        if how == ["resolve"]:
            if place in held:
                return 200, held[place], {**headers, "ETag": f'"{hashlib.sha1(held[place]).hexdigest()}"'}
            return 404, b'{"error": "not found"}', {**headers, "X-Error-Code": "EntryNotFound"}
        if how == ["tree"]:
            found: dict[str, dict[str, Any]] = {}
            for file, data in held.items():
                inside = file.removeprefix(f"{place}/") if place else file
                if place and inside == file:
                    continue
                top = (f"{place}/" if place else "") + inside.partition("/")[0]
                kind, size = ("directory", 0) if "/" in inside else ("file", len(data))
                found[top] = {"type": kind, "path": top, "size": size, "oid": hashlib.sha1(data).hexdigest()}
            if place and not found:
                return 404, b'{"error": "not found"}', {**headers, "X-Error-Code": "EntryNotFound"}
            return 200, json.dumps([*found.values()]).encode(), headers
        said = {"id": name, "sha": SHA, "private": False, "siblings": [{"rfilename": file} for file in held]}
        return 200, json.dumps(said).encode(), headers

    def _model(self, name: str, rest: list[str], body: bytes) -> Any:
        if rest[:1] == ["preupload"]:
            named = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for one in json.loads(body)["files"]]  # fmt: skip
            return {"files": named}
        if rest[:1] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files.setdefault(name, {})[line["value"]["path"]] = content
            return {"success": True, "commitOid": SHA, "commitUrl": f"{self.url}/{name}/commit/{SHA}"}
        if rest[:1] == ["tree"]:
            return [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in self.files.get(name, {}).items()]  # fmt: skip
        return {"id": name, "modelId": name, "private": self.repositories[name], "sha": SHA, "siblings": []}


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """The server, while it runs."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            state.requests.append((self.command, self.path, body))
            status, data, headers = state.answer(self.command, self.path, body)
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = _answer

        def log_message(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def point_at(state: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path, token: str | None = "hf_test") -> None:
    """The client of this process speaks to that server, logged in with ``token``, with a cache of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", state.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", state.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
