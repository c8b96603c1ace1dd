"""A W&B server as small as its client allows: one run, kept in memory, with what a client reads when it resumes."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.http_server import answering


class Server(ThreadingHTTPServer):
    """`history`: the rows that arrived, in their order; `runs`: the ids that clients asked for. With `goes_down` it
    answers every request with 503 once a run has begun."""

    daemon_threads = True

    def __init__(self, goes_down: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: list[str] = []
        self.summary = "{}"
        self.runs: set[str] = set()
        self.goes_down = goes_down
        self.lock = threading.Lock()

    @property
    def down(self) -> bool:
        return self.goes_down and bool(self.runs)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.history]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        raw = gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw
        if self.server.down:
            self.answer(503, {})
            return
        with self.server.lock:
            if self.path == "/graphql":
                self.answer(200, {"data": self.graphql(json.loads(raw))})
            elif self.path.endswith("/file_stream"):
                self.answer(200, self.stream(json.loads(raw)))
            else:  # the client's own telemetry
                self.answer(200, {})

    def do_GET(self) -> None:
        self.answer(503 if self.server.down else 200, {})

    do_PUT = do_GET

    def graphql(self, asked: dict[str, Any]) -> dict[str, Any]:
        query, given = asked["query"], asked.get("variables") or {}
        if "upsertBucket" in query:
            self.server.runs.add(given["name"])
            project = {"name": "opentau_train", "entity": {"name": "lab"}}
            bucket = {"id": "run", "name": given["name"], "displayName": given.get("displayName"), "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": not self.server.history}}
        if "historyTail" in query:
            return {"model": {"bucket": self.resume_status(given["name"])}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "lab", "username": "lab", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def resume_status(self, name: str) -> dict[str, Any] | None:
        rows = self.server.history
        if not rows:
            return None
        return {
            "id": "run",
            "name": name,
            "displayName": name,
            "summaryMetrics": self.server.summary,
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyLineCount": len(rows),
            "historyTail": json.dumps(rows[-1:]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }

    def stream(self, asked: dict[str, Any]) -> dict[str, Any]:
        for name, part in (asked.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                self.server.history[part["offset"] :] = part["content"]
            if name == "wandb-summary.json":
                self.server.summary = part["content"][-1]
        return {}

    def answer(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serving(*, goes_down: bool = False) -> Iterator[Server]:
    server = Server(goes_down)
    with answering(server):
        yield server
