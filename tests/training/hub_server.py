"""A server that speaks what the Hugging Face hub's client needs to push and fetch a model."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_right"


class Handler(http.server.BaseHTTPRequestHandler):
    """Keeps what is pushed in `repositories`: name -> its branches' files, and whether private."""

    protocol_version = "HTTP/1.1"
    repositories: ClassVar[dict[str, dict[str, Any]]] = {}

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code)

    @property
    def may_write(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {TOKEN}"

    def seen(self, name: str) -> dict[str, Any] | None:
        """The repository, where there is one and the token may see it; else refuses."""
        found = self.repositories.get(name)
        if found is None or (found["private"] and not self.may_write):
            self.refuse(401 if not self.may_write else 404, "RepoNotFound")
            return None
        return found

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path
        if path == "/api/validate-yaml":  # the hub looks at the front matter of a card
            head = json.loads(body)["content"].split("---\n")[1]
            assert isinstance(yaml.safe_load(head), dict)
            return self.answer(200, {"errors": [], "warnings": []})
        if not self.may_write:
            return self.refuse(401, "Unauthorized")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name.startswith("others/"):
                return self.refuse(403, "Forbidden")
            address = f"http://{self.headers['Host']}/{name}"
            if name in self.repositories:
                return self.answer(409, {"error": "exists", "url": address})
            self.repositories[name] = {
                # `private` was the field until the client's version 2.
                "private": asked.get("visibility") == "private" or bool(asked.get("private")),
                "branches": {"main": {}},
            }
            return self.answer(200, {"url": address})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        assert found is not None, path
        name, what, revision = found[1], found[2], unquote(found[3])
        repository = self.seen(name)
        if repository is None:
            return None
        if what == "branch":
            repository["branches"].setdefault(revision, {})
            return self.answer(200, {})
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in files
            ]
            return self.answer(200, {"files": modes})
        branch = dict(repository["branches"][revision])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                branch[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        repository["branches"][revision] = branch
        address = f"http://{self.headers['Host']}/{name}/commit/{commit(branch)}"
        return self.answer(
            200, {"success": True, "commitOid": commit(branch), "commitUrl": address}
        )

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/":
            return self.answer(200, b"hub")
        form = r"/(?:api/models/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+))?(?:/(.+))?"
        found = re.fullmatch(form, path)
        assert found is not None, path
        name, what, revision, file = found.groups()
        repository = self.seen(name)
        if repository is None:
            return None
        branches = repository["branches"]
        known = {commit(files): files for files in branches.values()} | branches
        files = known.get(revision or "main")
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        if what == "tree":
            listed = [
                {"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                for k, v in files.items()
            ]
            return self.answer(200, listed)
        if what == "resolve":
            content = files[file]
            return self.answer(
                200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"',
                X_Repo_Commit=commit(files),
            )  # fmt: skip
        return self.answer(
            200, {"id": name, "sha": commit(files), "private": repository["private"], "tags": []}
        )

    do_HEAD = do_GET  # noqa: N815


def commit(files: dict[str, bytes]) -> str:
    """What stands for a state of a branch."""
    text = repr(sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items()))
    return hashlib.sha1(text.encode()).hexdigest()


@contextmanager
def running() -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """The address of a server, and its repositories."""
    Handler.repositories = {}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        # It looks every hundredth of a second whether it shall stop.
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", Handler.repositories
        finally:
            server.shutdown()
