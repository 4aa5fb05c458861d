"""A hub on loopback: the part of the Hugging Face hub's HTTP API that its client uses to read and write models.

It keeps what clients send: a commit is a tree of files, large ones lie apart under their SHA-256 (git-lfs), and are
served from another host name that takes no access token. It does not know the Xet protocol.
"""

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
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = 10 << 20
"""Bytes from which any file is a large one; safetensors always are."""


@dataclass(frozen=True)
class File:
    """`oid` is git's name of its bytes, or the SHA-256 of a large one."""

    oid: str
    size: int
    large: bool


Tree = dict[str, File]


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Tree] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, tree: Tree, message: str) -> str:
        parent = self.branches.get(branch, "")
        names = json.dumps([parent, message, sorted((name, file.oid) for name, file in tree.items())])
        sha = hashlib.sha1(names.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = tree, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch or a commit's own name means."""
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Cut:
    """Answers that carry `name` end after so many of the file's bytes, so many times."""

    name: str
    after: int
    times: int


class Refused(Exception):
    """An answer that is an error, as the hub gives it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Hub:
    """State of a running server.

    Attributes:
        url: its address. tokens: access token -> the names that it may write under.
        requests: method and path of each, in order. cut: transfers that break off.
        down: status of every answer, if set.
    """

    url: str
    tokens: dict[str, set[str]] = field(default_factory=lambda: {"hf_alice": {"alice", "lab"}, "hf_bob": {"bob"}})
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    cut: list[Cut] = field(default_factory=list)
    down: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def put(self, name: str, files: dict[str, bytes], branch: str = "main", **options: Any) -> str:
        """A commit with these files more, in a repository that is made if need be; the commit's name."""
        repository = self.repositories.setdefault(name, Repository(**options))
        tree = dict(repository.commits[repository.branches[branch]]) if branch in repository.branches else {}
        return repository.commit(branch, tree | {path: self.store(path, data) for path, data in files.items()}, "put")

    def put_folder(self, name: str, folder: Path, **options: Any) -> str:
        return self.put(name, {path.name: path.read_bytes() for path in folder.iterdir()}, **options)

    def store(self, path: str, data: bytes) -> File:
        oid = hashlib.sha256(data).hexdigest() if is_large(path, len(data)) else git_name(data)
        self.blobs[oid] = data
        return File(oid, len(data), is_large(path, len(data)))

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        repository = self.repositories[name]
        sha = repository.resolve(revision)
        assert sha is not None
        return {path: self.blobs[file.oid] for path, file in repository.commits[sha].items()}

    def asked(self, what: str) -> int:
        """How many requests had `what` in their method and path."""
        return sum(what in f"{method} {path}" for method, path in self.requests)


def is_large(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size >= LARGE


def git_name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Runs a hub on a free port; ends it whatever happens."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", rf"/api/models/{_ID}(?:/revision/([^/]+))?", "info"),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)", "tree"),
    ("HEAD", rf"/{_ID}/resolve/([^/]+)/(.+)", "head"),
    ("GET", rf"/{_ID}/resolve/([^/]+)/(.+)", "get"),
    ("GET", r"/large/([0-9a-f]{64})", "get_large"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{_ID}/branch/([^/]+)", "branch"),
    ("POST", rf"/api/models/{_ID}/preupload/([^/]+)", "preupload"),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/large/([0-9a-f]{64})", "put_large"),
    ("POST", r"/verify", "verify"),
    ("POST", rf"/api/models/{_ID}/commit/([^/]+)", "commit"),
]


class _Handler(BaseHTTPRequestHandler):
    """One connection. Methods named in `_ROUTES` get the parts of the path."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self._chunks()
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            try:
                if self.hub.down:
                    raise Refused(self.hub.down, "the hub is down")
                for method, pattern, name in _ROUTES:
                    if method == self.command and (found := re.fullmatch(pattern, path)):
                        parts = [None if part is None else unquote(part) for part in found.groups()]
                        return getattr(self, f"do_{name}")(*parts)
                raise Refused(404, f"no route {self.command} {path}")
            except Refused as error:
                self._refuse(error)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    # who may do what

    def _names(self) -> set[str] | None:
        """Names that the sender may write under; none for somebody unknown."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        names = self.hub.tokens.get(header.removeprefix("Bearer "))
        if names is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return names

    def _readable(self, name: str) -> Repository:
        names = self._names()
        found = self.hub.repositories.get(name)
        if found is None or (found.private and name.split("/")[0] not in (names or ())):
            if names is None:
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        return found

    def _writable(self, name: str) -> Repository:
        repository = self._readable(name)
        self._check_owner(name.split("/")[0])
        return repository

    def _check_owner(self, owner: str) -> None:
        names = self._names()
        if names is None:
            raise Refused(401, "Invalid username or password.")
        if owner not in names:
            raise Refused(403, f"You don't have the rights to write under the namespace {owner!r}")

    def _at(self, name: str, revision: str | None) -> tuple[str, Tree]:
        repository = self._readable(name)
        sha = repository.resolve(revision or "main")
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    def _file(self, name: str, revision: str, path: str) -> tuple[str, File]:
        sha, tree = self._at(name, revision)
        names = self._names()
        if self.hub.repositories[name].gated and name.split("/")[0] not in (names or ()):
            raise Refused(401 if names is None else 403, f"Access to model {name} is restricted.", "GatedRepo")
        if path not in tree:
            raise Refused(404, "Entry not found", "EntryNotFound")
        return sha, tree[path]

    # reading

    def do_info(self, name: str, revision: str | None) -> None:
        sha, tree = self._at(name, revision)
        repository = self.hub.repositories[name]
        self._json(
            {
                "_id": name,
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "siblings": [{"rfilename": path} for path in tree],
            }
        )

    def do_tree(self, name: str, revision: str) -> None:
        _, tree = self._at(name, revision)
        entries = []
        for path, file in sorted(tree.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
            if file.large:
                entry["oid"] = git_name(_pointer(file))
                entry["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": len(_pointer(file))}
            entries.append(entry)
        self._json(entries)

    def do_head(self, name: str, revision: str, path: str) -> None:
        sha, file = self._file(name, revision, path)
        if file.large:
            self._send(302, headers=self._large(sha, file))
        else:
            self._send(200, headers={"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Content-Length": str(file.size)})

    def do_get(self, name: str, revision: str, path: str) -> None:
        sha, file = self._file(name, revision, path)
        if file.large:
            self._send(302, headers=self._large(sha, file))
        else:
            self._bytes(path, self.hub.blobs[file.oid], {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"'})

    def _large(self, sha: str, file: File) -> dict[str, str]:
        return {
            "X-Repo-Commit": sha,
            "X-Linked-Etag": f'"{file.oid}"',
            "X-Linked-Size": str(file.size),
            "Location": f"{self._store()}/large/{file.oid}",
        }

    def _store(self) -> str:
        """Large files have a host of their own."""
        return self.hub.url.replace("127.0.0.1", "localhost")

    def do_get_large(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise Refused(400, "an access token was sent to the store of large files")
        names = {name for one in self.hub.repositories.values() for tree in one.commits.values()
                 for name, file in tree.items() if file.oid == oid}  # fmt: skip
        self._bytes(" ".join(sorted(names)), self.hub.blobs[oid], {})

    def _bytes(self, names: str, data: bytes, headers: dict[str, str]) -> None:
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        part = data[start:]
        for cut in self.hub.cut:
            if cut.name in names.split(" ") and cut.times > 0:
                cut.times -= 1
                self._head(206 if start else 200, headers | {"Content-Length": str(len(part))})
                self.wfile.write(part[: max(0, cut.after - start)])
                self.close_connection = True
                return
        self._send(206 if start else 200, part, headers)

    # writing

    def do_create(self) -> None:
        asked = json.loads(self.body)
        owner = asked["organization"]
        self._check_owner(owner)
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repositories:
            raise Refused(409, "You already created this model repo")
        repository = self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        attributes = self.hub.store(".gitattributes", b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repository.commit("main", {".gitattributes": attributes}, "initial commit")
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def do_validate(self) -> None:
        text = json.loads(self.body)["content"]
        try:
            head = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
        except yaml.YAMLError as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        self._json({"errors": [], "warnings": [] if head else [{"message": "empty or missing yaml metadata"}]})

    def do_branch(self, name: str, branch: str) -> None:
        repository = self._writable(name)
        if branch in repository.branches:
            raise Refused(409, f"Reference already exists: refs/heads/{branch}")
        repository.branches[branch] = repository.branches["main"]
        self._send(201, b"{}")

    def do_preupload(self, name: str, revision: str) -> None:
        self._writable(name)
        _, tree = self._at(name, revision)
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                        "shouldIgnore": False,
                        "oid": tree[file["path"]].oid if file["path"] in tree else None,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def do_batch(self, name: str) -> None:
        self._writable(name)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            if asked["oid"] not in self.hub.blobs:
                asked["actions"] = {
                    "upload": {"href": f"{self._store()}/large/{asked['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify"},
                }
            objects.append(asked)
        self._json({"transfer": "basic", "objects": objects})

    def do_put_large(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the bytes have another SHA-256")
        self.hub.blobs[oid] = self.body
        self._send(200)

    def do_verify(self) -> None:
        asked = json.loads(self.body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "this object did not arrive")
        self._json({})

    def do_commit(self, name: str, branch: str) -> None:
        repository = self._writable(name)
        if branch not in repository.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        tree = dict(repository.commits[repository.branches[branch]])
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                data = base64.b64decode(value["content"])
                if is_large(value["path"], len(data)):
                    raise Refused(400, f"{value['path']} is too large for a plain file")
                tree[value["path"]] = self.hub.store(value["path"], data)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, f"{value['path']} points to an object that did not arrive")
                tree[value["path"]] = File(value["oid"], len(self.hub.blobs[value["oid"]]), True)
            elif item["key"] == "deletedFile":
                if tree.pop(value["path"], None) is None:
                    raise Refused(400, f"{value['path']} is not there to be deleted")
            else:
                raise Refused(400, f"unknown operation {item['key']}")
        sha = repository.commit(branch, tree, message)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    # answers

    def _refuse(self, error: Refused) -> None:
        headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
        self._json({"error": error.message}, error.status, headers)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self._head(status, {"Content-Length": str(len(body))} | (headers or {}))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


def _pointer(file: File) -> bytes:
    """What git keeps of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{file.oid}\nsize {file.size}\n".encode()
