"""A stand-in for the Hugging Face Hub: a real HTTP server that lists, redirects to its CDN, refuses, cuts and lies."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

MAIN = "1" * 40


@dataclass
class Repo:
    """A model repository: its files at each commit, and who may read them."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str] = field(default_factory=lambda: {"main": MAIN})
    gated: bool = False
    admitted: set[str] = field(default_factory=set)  # tokens whose accounts have accepted the licence

    def commit(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass(frozen=True)
class Request:
    """What was asked."""

    method: str
    host: str  # without its port
    path: str
    range: str | None
    authorization: str | None


class HubServer:
    """Serves `repos`. Files that end in .safetensors are kept by its CDN, which has another name of the same host."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: set[str] = set()
        self.requests: list[Request] = []
        self.cuts: dict[str, list[int]] = {}  # by name: after how many bytes each of its next answers breaks off
        self.lies: set[str] = set()  # names whose bytes are others than listed
        self.knows_ranges = True
        self.failures: list[tuple[int, dict[str, str]]] = []  # what the next requests are answered
        self.hold = threading.Event()  # cleared: bodies stop after their first byte, until it is set
        self.hold.set()
        self.holding = threading.Event()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, files: dict[str, bytes], **options: object) -> Repo:
        self.repos[name] = Repo({MAIN: files}, **options)  # type: ignore[arg-type]
        return self.repos[name]

    def asked(self, name: str) -> list[Request]:
        """The requests for the bytes of a file, in order."""
        paths = {f"/cdn/{_sum(data)}" for repo in self.repos.values() for files in repo.commits.values()
                 for path, data in files.items() if path == name}  # fmt: skip
        return [one for one in self.requests if one.method == "GET" and (one.path in paths or _names(one.path, name))]


@contextmanager
def serving() -> Iterator[HubServer]:
    hub = HubServer()

    class Handler(_Handler):
        server_hub = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        hub.port = http.server_address[1]
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.hold.set()
            http.shutdown()
            thread.join()


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder as a repository holds it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        host = (self.headers["host"] or "").partition(":")[0]
        hub.requests.append(Request(self.command, host, path, self.headers["range"], self.headers["authorization"]))
        if hub.failures:
            status, headers = hub.failures.pop(0)
            return self._answer(status, b"", headers)
        if path.startswith("/cdn/"):
            return self._serve_cdn(path.removeprefix("/cdn/"))
        if path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            return self._list(name, revision or "main")
        name, found, rest = path.lstrip("/").partition("/resolve/")
        if found:
            revision, _, file = rest.partition("/")
            return self._resolve(name, revision, file)
        return self._answer(404, b"no such page")

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass

    def _token(self) -> str | None:
        return (self.headers["authorization"] or "").removeprefix("Bearer ") or None

    def _repo(self, name: str, revision: str) -> tuple[Repo, str] | None:
        """The repository and commit; None once it is refused."""
        token, repo = self._token(), self.server_hub.repos.get(name)
        if token is not None and token not in self.server_hub.tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repo is None:
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif (commit := repo.commit(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repo, commit
        return None

    def _list(self, name: str, revision: str) -> None:
        if (found := self._repo(name, revision)) is None:
            return
        repo, commit = found
        siblings = [_sibling(path, data) for path, data in sorted(repo.commits[commit].items())]
        listing = {"id": name, "sha": commit, "siblings": siblings, "gated": "auto" if repo.gated else False}
        self._answer(200, json.dumps(listing).encode(), {"content-type": "application/json"})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if (found := self._repo(name, revision)) is None:
            return
        repo, commit = found
        if repo.gated and self._token() not in repo.admitted:
            self._refuse(403 if self._token() else 401, "GatedRepo", f"Access to model {name} is restricted.")
            return
        data = repo.commits[commit].get(path)
        if data is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        headers = {"x-repo-commit": commit, "etag": f'"{_sum(data) if _is_large(path) else _git_sum(data)}"'}
        if _is_large(path):
            headers |= {"x-linked-etag": headers["etag"], "x-linked-size": str(len(data))}
            headers["location"] = f"http://localhost:{self.server_hub.port}/cdn/{_sum(data)}?signature=s"
            self._answer(302, b"", headers)
        else:
            self._send(path, data, headers)

    def _serve_cdn(self, sum: str) -> None:
        for repo in self.server_hub.repos.values():
            for files in repo.commits.values():
                for path, data in files.items():
                    if _sum(data) == sum:
                        return self._send(path, data, {"etag": f'"{sum}"'})
        return self._answer(404, b"")

    def _send(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        hub, start = self.server_hub, 0
        if path in hub.lies:
            data = bytes([data[0] ^ 1]) + data[1:]
        if self.headers["range"] and hub.knows_ranges:
            start = int(self.headers["range"].removeprefix("bytes=").removesuffix("-"))
            headers["content-range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = hub.cuts[path].pop(0) if hub.cuts.get(path) else None
        self._answer(206 if "content-range" in headers else 200, data[start:], headers, cut)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, message.encode(), {"x-error-code": code, "x-error-message": message})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if not self.server_hub.hold.is_set() and "/cdn/" in self.path:
            self.wfile.write(body[:1])
            self.wfile.flush()
            body = body[1:]
            self.server_hub.holding.set()
            self.server_hub.hold.wait(30)
        try:
            self.wfile.write(body if cut is None else body[:cut])
        except OSError:
            self.close_connection = True  # the client went away
        if cut is not None:
            self.close_connection = True


def _sibling(path: str, data: bytes) -> dict[str, object]:
    plain = {"rfilename": path, "size": len(data), "blobId": _git_sum(data)}
    lfs = {"lfs": {"sha256": _sum(data), "size": len(data), "pointerSize": 134}} if _is_large(path) else {}
    return plain | lfs


def _names(path: str, name: str) -> bool:
    return "/resolve/" in path and path.partition("/resolve/")[2].partition("/")[2] == name and not _is_large(name)


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_sum(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
