"""A small Hugging Face Hub: what `huggingface_hub` asks of the real one to create, upload and download, over HTTP.

Its requests are those of huggingface_hub 2.4 (hf_api.py, _commit_api.py, lfs.py, file_download.py). Left out: Xet, the
redirect to where large files are stored, branches but main.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_owner"
READER = "hf_that_may_read"


@dataclass
class Repository:
    """Its commits in their order: each one's files, by path. large: those of them that are stored by sha256."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    gated: bool = False

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def commit(self, changes: dict[str, bytes | None]) -> str:
        """Add, replace or (None) delete files."""
        before = self.commits[self.head] if self.commits else {}
        files = {name: content for name, content in {**before, **changes}.items() if content is not None}
        self.large |= {name for name in files if name.endswith(".pt2")}
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        return oid


@dataclass
class Hub:
    """cut: bytes of a file's body after which its next download is cut off. hang: those after which it stands still.
    failing: what a request's path holds if the Hub fails at it.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    hang: dict[str, int] = field(default_factory=dict)
    hanging: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    failing: str | None = None
    url: str = ""

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def downloads(self, name: str) -> list[str | None]:
        """The Range headers of a file's downloads."""
        return [where for method, path, where in self.requests if method == "GET" and path.endswith(f"/{name}")]


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def _any(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        try:
            if self.hub.failing is not None and self.hub.failing in path:
                raise _RefusedError(500)
            self._answer(path.strip("/").split("/"), body)
        except _RefusedError as refused:
            self._send(refused.status, b"{}", {"X-Error-Code": refused.code, "X-Error-Message": refused.message})

    do_GET = do_HEAD = do_POST = do_PUT = _any  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, parts: list[str], body: bytes) -> None:
        match parts:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                self._check_write()
                there = name in self.hub.repositories
                if not there:
                    self.hub.repositories[name] = Repository()
                    self.hub.repositories[name].commit({".gitattributes": b"*.bin filter=lfs\n"})
                self._json({"url": f"{self.hub.url}/{name}"}, 409 if there else 200)
            case ["api", "validate-yaml"]:
                content = json.loads(body)["content"]
                self._json({"errors": []}, 200 if content.startswith("---\n") else 400)
            case ["api", "models", owner, name, *revision]:
                repository = self._repository(f"{owner}/{name}")
                match revision:
                    case ["preupload", "main"]:
                        self._json({"files": [self._mode(repository, file) for file in json.loads(body)["files"]]})
                    case ["commit", "main"]:
                        self._commit(f"{owner}/{name}", repository, body)
                    case [] | ["revision", _]:
                        self._info(f"{owner}/{name}", repository, revision[1] if revision else "main")
                    case _:
                        raise _RefusedError(404)
            case [_, git, "info", "lfs", "objects", "batch"] if git.endswith(".git"):
                self._check_write()
                self._json({"objects": [self._instructions(file) for file in json.loads(body)["objects"]]})
            case ["stored", oid] if self.command == "PUT":
                if hashlib.sha256(body).hexdigest() != oid:
                    raise _RefusedError(400)
                self.hub.stored[oid] = body
                self._send(200, b"")
            case [owner, name, "resolve", revision, *file]:
                self._file(self._repository(f"{owner}/{name}"), revision, "/".join(file))
            case _:
                raise _RefusedError(404)

    def _token(self) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given not in ("", TOKEN, READER):
            raise _RefusedError(401, message="Invalid credentials in Authorization header")
        return given or None

    def _check_write(self) -> None:
        token = self._token()
        if token != TOKEN:
            raise _RefusedError(
                401 if token is None else 403, message="" if token is None else "You may not write here"
            )

    def _repository(self, name: str) -> Repository:
        """As on the Hub: 401 for what is missing, if nobody is logged in, so that it tells nothing of private ones."""
        token = self._token()
        if name not in self.hub.repositories:
            raise (
                _RefusedError(404, "RepoNotFound")
                if token
                else _RefusedError(401, message="Invalid username or password.")
            )
        if self.hub.repositories[name].gated and token is None and "/resolve/" in self.path:
            raise _RefusedError(401, "GatedRepo")
        return self.hub.repositories[name]

    def _revision(self, repository: Repository, revision: str) -> str:
        commit = repository.head if revision == "main" else revision
        if commit not in repository.commits:
            raise _RefusedError(404, "RevisionNotFound")
        return commit

    def _info(self, name: str, repository: Repository, revision: str) -> None:
        commit = self._revision(repository, revision)
        siblings = []
        for path, content in repository.commits[commit].items():
            lfs = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
            siblings.append({"rfilename": path, **({"lfs": lfs} if path in repository.large else {})})
        self._json({"id": name, "sha": commit, "siblings": siblings})

    def _mode(self, repository: Repository, file: dict[str, Any]) -> dict[str, Any]:
        binary = b"\0" in base64.b64decode(file["sample"])
        return {"path": file["path"], "uploadMode": "lfs" if binary else "regular", "shouldIgnore": False}

    def _instructions(self, file: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.hub.url}/stored/{file['oid']}"}}
        return {**file, **({} if file["oid"] in self.hub.stored else {"actions": upload})}

    def _commit(self, name: str, repository: Repository, body: bytes) -> None:
        self._check_write()
        changes: dict[str, bytes | None] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header" if value.get("parentCommit", repository.head) != repository.head:
                    raise _RefusedError(412)
                case "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    changes[value["path"]] = self.hub.stored[value["oid"]]
        oid = repository.commit(changes)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def _file(self, repository: Repository, revision: str, name: str) -> None:
        commit = self._revision(repository, revision)
        if name not in repository.commits[commit]:
            raise _RefusedError(404, "EntryNotFound")
        content = repository.commits[commit][name]
        kind = hashlib.sha256 if name in repository.large else hashlib.sha1
        headers = {"X-Repo-Commit": commit, "ETag": f'"{kind(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if asked else 200, content[start:], headers, name)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, file: str = "") -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if file in self.hub.cut:
            self.wfile.write(body[: self.hub.cut.pop(file)])
            self.close_connection = True
        elif file in self.hub.hang:
            self.wfile.write(body[: self.hub.hang.pop(file)])
            self.wfile.flush()
            self.hub.hanging.set()
            self.hub.released.wait(60)
            self.close_connection = True
        else:
            self.wfile.write(body)
