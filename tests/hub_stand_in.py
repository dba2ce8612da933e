"""A stand-in for the Hugging Face hub on this machine, as far as huggingface_hub asks for it.

Repositories with one branch, commits with small files inside and large ones through LFS, downloads.
It can be told to fail: see ``Hub.fail``.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import yaml


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1("\n".join(self.commits).encode()).hexdigest()


@dataclass
class Hub:
    """What the stand-in holds.

    ``fail`` is asked about every request, as "METHOD /path", and answers with a status to fail with,
    0 to break the connection, or None to go on.
    """

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256
    requests: list[str] = field(default_factory=list)
    fail: Callable[[str], int | None] = lambda request: None


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """Run a hub until the block ends."""
    state = Hub()

    class Handler(_Handler):
        hub = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: object = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(length)
        path = unquote(urlparse(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        status = self.hub.fail(request)
        if status == 0:
            self.close_connection = True
            self.connection.close()
            return
        if status is not None:
            self._answer(status, {"error": "injected"})
            return
        for pattern, method in self.ROUTES:
            match = re.fullmatch(pattern, request)
            if match:
                method(self, body, *match.groups())
                return
        self._answer(404, {"error": f"no route for {request}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name'].rsplit('/', 1)[-1]}"
        status = 409 if name in self.hub.repositories else 200
        # Newer clients say it with "visibility".
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repositories.setdefault(name, Repository(private=private))
        self._answer(status, {"url": f"{self.hub.address}/{name}", "name": name})

    def _validate(self, body: bytes) -> None:
        header = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        errors = [] if header.get("license") else [{"message": "a license is missing"}]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _preupload(self, body: bytes, name: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs"
                if re.search(r"\.(pt|safetensors)$", file["path"])
                else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _batch(self, body: bytes, name: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.address}/lfs/{wanted['oid']}"}}
            objects.append(
                wanted | ({} if wanted["oid"] in self.hub.large else {"actions": actions})
            )
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._answer(200)

    def _commit(self, body: bytes, name: str) -> None:
        repository = self.hub.repositories[name]
        files = dict(repository.files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                raise AssertionError(line["key"])
        repository.files = files
        repository.commits.append(message)
        url = f"{self.hub.address}/{name}/commit/{repository.sha}"
        self._answer(200, {"success": True, "commitOid": repository.sha, "commitUrl": url})

    def _info(self, body: bytes, name: str) -> None:
        if name not in self.hub.repositories:
            self._answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
            return
        repository = self.hub.repositories[name]
        siblings = [{"rfilename": path} for path in repository.files]
        self._answer(
            200, {"id": name, "modelId": name, "sha": repository.sha, "siblings": siblings}
        )

    def _tree(self, body: bytes, name: str) -> None:
        files = self.hub.repositories[name].files
        found = [
            {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            for p, c in files.items()
        ]
        self._answer(200, found)

    def _resolve(self, body: bytes, name: str, path: str) -> None:
        repository = self.hub.repositories.get(name, Repository())
        if path not in repository.files:
            self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=repository.sha)
            return
        content = repository.files[path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._answer(200, content, X_Repo_Commit=repository.sha, ETag=etag)

    NAME = r"([^/]+/[^/]+)"
    ROUTES = (
        (r"POST /api/repos/create", _create),
        (r"POST /api/validate-yaml", _validate),
        (rf"POST /api/models/{NAME}/preupload/main", _preupload),
        (rf"POST /{NAME}\.git/info/lfs/objects/batch", _batch),
        (r"PUT /lfs/([0-9a-f]+)", _put),
        (rf"POST /api/models/{NAME}/commit/main", _commit),
        (rf"GET /api/models/{NAME}(?:/revision/[^/]+)?", _info),
        (rf"GET /api/models/{NAME}/tree/[^/]+", _tree),
        (rf"(?:GET|HEAD) /{NAME}/resolve/[^/]+/(.+)", _resolve),
    )
