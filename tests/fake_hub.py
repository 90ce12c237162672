"""A local Hugging Face Hub with the part of the HTTP interface that downloads and uploads of models need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

OWNER = "someone"
TOKEN = "hf_test"


@dataclass
class Repository:
    """Commits of a repository: commit -> path -> content; and its branches and tags."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    license: str | None = None

    def commit(self, files: dict[str, bytes | None], branch: str = "main") -> str:
        """Add or replace files on a branch, which begins empty, or delete those that are None; returns the commit."""
        content = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        content = {path: file for path, file in content.items() if file is not None}
        name = hashlib.sha1(repr((len(self.commits), sorted(content))).encode()).hexdigest()
        self.commits[name], self.branches[branch] = content, name
        return name

    def resolve(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


class FakeHub:
    """The server's state, and the requests that it received.

    Attributes:
        requests: "METHOD path" of each request. cut: paths of files whose transfer breaks off in the middle.
        damaged: what is answered instead of any listing. forbidden: whether writing is refused.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.cut: set[str] = set()
        self.damaged: bytes | None = None
        self.forbidden = False
        self.blobs: dict[str, bytes] = {}
        self.url = ""

    def add(self, name: str, files: dict[str, bytes | Path | None], branch: str = "main", **about) -> str:
        """Add files to a repository, which is created, or delete those that are None; returns the commit."""
        repository = self.repositories.setdefault(name, Repository(**about))
        contents = {path: file.read_bytes() if isinstance(file, Path) else file for path, file in files.items()}
        return repository.commit(contents, branch)

    def sent(self) -> list[str]:
        """The files whose content was asked for."""
        return [line.split("/resolve/")[1].partition("/")[2] for line in self.requests if line.startswith("GET /") and
                "/resolve/" in line]  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{method} {unquote(path)}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, name in ROUTES:
            if match := re.fullmatch(pattern, f"{method} {path}"):
                getattr(self, name)(*map(unquote, match.groups()))
                return
        self._send(404, {"error": "Not Found"})

    def _send(self, status: int, value=b"", headers=None, body: bool = True) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)

    def _fail(self, status: int, code: str) -> None:
        self._send(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    @property
    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _find(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the commit; None after the answer that there is none."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._logged_in):
            self._fail(404 if self._logged_in else 401, "RepoNotFound")
            return None
        if (commit := repository.resolve(revision)) is None:
            self._fail(404, "RevisionNotFound")
            return None
        return repository, commit

    def info(self, name: str, revision: str = "main") -> None:
        if (found := self._find(name, revision)) is None:
            return
        if self.hub.damaged is not None:
            self._send(200, self.hub.damaged)
            return
        repository, commit = found
        files = repository.commits[commit]
        siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        about = {"license": repository.license} if repository.license else {}
        answer = {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "cardData": about}
        self._send(200, {**answer, "tags": []})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (found := self._find(name, revision)) is None:
            return
        repository, commit = found
        if repository.gated and not self._logged_in:
            self._fail(401, "GatedRepo")
            return
        if path not in repository.commits[commit]:
            self._fail(404, "EntryNotFound")
            return
        content = repository.commits[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if self.command == "GET" and path in self.hub.cut:
            start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
            middle = len(content) // 2
            self.send_response(206 if start else 200)
            for key, text in {**headers, "Content-Length": str(len(content) - start)}.items():
                self.send_header(key, text)
            self.end_headers()
            self.wfile.write(content[start:middle])
            self.close_connection = True
            return
        self._send(200, content, headers)

    def who(self) -> None:
        if self._logged_in:
            self._send(200, {"name": OWNER, "type": "user", "orgs": []})
        else:
            self._send(401, {"error": "Invalid credentials"})

    def create(self) -> None:
        if self._may_write():
            asked = json.loads(self.body)
            name = f"{asked.get('organization') or OWNER}/{asked['name']}"
            if name in self.hub.repositories:
                self._send(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
                return
            # One key or the other, by the version of huggingface_hub.
            self.hub.repositories[name] = Repository(
                private=asked.get("visibility") == "private" or bool(asked.get("private"))
            )
            self.hub.add(name, {".gitattributes": b""})
            self._send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, name: str, branch: str) -> None:
        repository = self.hub.repositories[name]
        if branch in repository.branches:
            self._send(409, {"error": "exists"})
            return
        repository.branches[branch] = repository.branches["main"]
        self._send(200, {})

    def validate(self) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if self._may_write() and self._find(name, revision) is not None:
            files = json.loads(self.body)["files"]
            large = (".safetensors", ".onnx", ".png", ".data")
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                 "shouldIgnore": False, "oid": None}
                for f in files
            ]  # fmt: skip
            self._send(200, {"files": modes})

    def batch(self, name: str) -> None:
        asked = json.loads(self.body)["objects"]
        objects = [{**entry, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}} for entry in asked]
        self._send(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self._send(200)

    def commit(self, name: str, revision: str) -> None:
        files = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                assert (
                    value["path"] in self.hub.repositories[name].commits[self.hub.repositories[name].branches[revision]]
                )
                files[value["path"]] = None
        commit = self.hub.add(name, files, revision)
        self._send(200, {"commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def _may_write(self) -> bool:
        if self.hub.forbidden:
            self._send(403, {"error": "Forbidden"}, {"X-Error-Message": "you have no write access"})
        elif not self._logged_in:
            self._send(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
        else:
            return True
        return False


NAME = r"([^/]+/[^/]+)"
ROUTES = (
    (rf"GET /api/models/{NAME}", "info"),
    (rf"GET /api/models/{NAME}/revision/([^/]+)", "info"),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", "resolve"),
    (r"GET /api/whoami-v2", "who"),
    (r"POST /api/repos/create", "create"),
    (rf"POST /api/models/{NAME}/branch/([^/]+)", "branch"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"POST /api/models/{NAME}/preupload/([^/]+)", "preupload"),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /lfs/(\w+)", "store"),
    (rf"POST /api/models/{NAME}/commit/([^/]+)", "commit"),
)


@contextmanager
def serve_hub(cache: Path) -> Iterator[FakeHub]:
    """Serve an empty Hub that huggingface_hub uses as the real one, with an empty cache and no token."""
    from huggingface_hub import constants

    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(constants, name, value, raising=False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_ENDPOINT", hub.url)
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
