"""A stand-in for the Hugging Face Hub: the part of its HTTP interface by which `huggingface_hub` reads and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_stand_in"

Files = dict[str, bytes]


class FakeHub:
    """Serves repositories in a `with` block.

    repos:    by `owner/name`, the commits in order: (40 hex digits, files by path). Branch `main` is the last.
    requests: "METHOD path" of all that was asked.
    """

    def __init__(self) -> None:
        self.repos: dict[str, list[tuple[str, Files]]] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo: str, files: Files) -> str:
        """Add files to a repository. Returns the commit."""
        commits = self.repos.setdefault(repo, [])
        both = {**(commits[-1][1] if commits else {}), **files}
        name = hashlib.sha1(repr((len(commits), sorted(both.items()))).encode()).hexdigest()
        commits.append((name, both))
        return name

    def environment(self, home: str, **more: str) -> dict[str, str]:
        """The variables by which a process finds this hub, its own cache in `home`."""
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": home, "HF_HUB_OFFLINE": "0", **quiet, **more}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._read(with_body=False)

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            answer = {"name": "someone", "type": "user"} if known else {"error": "Invalid token"}
            self._answer_json(answer, 200 if known else 401)
        else:
            self._read(with_body=True)

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer_json({"error": "Invalid token"}, 401)
        elif self.path == "/api/validate-yaml":
            self._answer_json({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            exists = repo in self.hub.repos
            self.hub.repos.setdefault(repo, [])
            self._answer_json({"url": f"{self.hub.url}/{repo}"}, 409 if exists else 200)
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", self.path):
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer_json({"files": [{"path": file["path"], **how} for file in json.loads(body)["files"]]})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", self.path):
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            commit = self.hub.commit(found[1], {file["path"]: base64.b64decode(file["content"]) for file in files})
            url = f"{self.hub.url}/{found[1]}/commit/{commit}"
            self._answer_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
        else:
            self._answer_json({"error": "Not found"}, 404)

    def _read(self, with_body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", unquote(self.path))
        commits = self.hub.repos.get(found[1]) if found else None
        if not found or not commits:
            return self._refuse("RepoNotFound", 404 if found else 400)
        by_name = dict(commits) | {"main": commits[-1][1]}
        if found[2] not in by_name:
            return self._refuse("RevisionNotFound", 404)
        commit = commits[-1][0] if found[2] == "main" else found[2]
        content = by_name[found[2]].get(found[3])
        if content is None:
            return self._refuse("EntryNotFound", 404, commit)
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = {"X-Repo-Commit": commit, "ETag": tag, "Content-Length": str(len(content))}
        self._answer(content if with_body else b"", 200, headers)

    def _refuse(self, why: str, status: int, commit: str | None = None) -> None:
        headers = {"X-Error-Code": why, "X-Error-Message": why, **({"X-Repo-Commit": commit} if commit else {})}
        self._answer(b"", status, {**headers, "Content-Length": "0"})

    def _answer_json(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self._answer(content, status, {"Content-Type": "application/json", "Content-Length": str(len(content))})

    def _answer(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
