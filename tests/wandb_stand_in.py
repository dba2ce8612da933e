"""A stand-in for the Weights & Biases service on this machine, as far as its client asks for it."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Service:
    """What the stand-in was told: settings and history by run id, as the client sent them."""

    address: str = ""
    names: dict[str, str] = field(default_factory=dict)
    history: dict[str, list[dict]] = field(default_factory=dict)
    resumes: bool = True
    """Tell clients what it has of a run, so that they go on behind it."""
    down: bool = False
    """Break every connection from now on."""


@contextlib.contextmanager
def service() -> Iterator[Service]:
    """Run the service until the block ends."""
    state = Service()

    class Handler(_Handler):
        service = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    service: Service
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.service.down:
            self.close_connection = True
            self.connection.close()
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: object = {}
        stream = re.fullmatch(r"/files/(?:[^/]*/)?[^/]+/([^/]+)/file_stream", self.path)
        if self.path == "/graphql":
            asked = json.loads(body)
            reply = getattr(self, asked["operationName"], lambda variables: {})
            answer = {"data": reply(asked["variables"])}
        elif stream:
            sent = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            lines = [
                *self.service.history.get(stream[1], ()),
                *map(json.loads, sent.get("content", [])),
            ]
            # As in the real one, a step that is sent again takes the place of the one before.
            steps = {line["_step"]: line for line in lines}
            self.service.history[stream[1]] = [steps[step] for step in sorted(steps)]
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def RunResumeStatus(self, variables: dict) -> dict:
        name = variables["name"]
        history = self.service.history.get(name, [])
        model = {"id": "p", "name": variables["project"], "entity": {"id": "me", "name": "me"}}
        bucket = {
            "id": name,
            "name": name,
            "displayName": self.service.names.get(name),
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "historyLineCount": len(history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in history[-1:]]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }
        known = self.service.resumes and name in self.service.names
        return {"model": model | {"bucket": bucket if known else None}}

    def UpsertBucket(self, variables: dict) -> dict:
        name = variables["name"]
        self.service.names.setdefault(name, variables["displayName"])
        project = {"name": variables["project"], "entity": {"name": "me"}}
        bucket = {
            "id": name,
            "name": name,
            "displayName": variables["displayName"],
            "project": project,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def CreateRunFiles(self, variables: dict) -> dict:
        files = [
            {"name": n, "uploadUrl": f"{self.service.address}/put"} for n in variables["files"]
        ]
        return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
