"""A stand-in for the Hugging Face Hub's HTTP API, as far as huggingface_hub uses it to make a model's repository, to
commit files (small ones in the commit, large ones by git-lfs's batch protocol) and to download a snapshot. Run with
HF_HUB_DISABLE_XET=1: Xet's storage speaks another protocol.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

from tests.http_server import answering

TOKEN = "hf_of_the_test"


@dataclass
class Hub:
    """`repos` {OWNER/NAME: {path: content}}; `asked`: methods and paths, in their order."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def environment(self, home: Path, token: str = TOKEN) -> dict[str, str]:
        """What a process needs to take this for the Hub."""
        given = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
        return {**given, "HF_HUB_DISABLE_TELEMETRY": "1"}

    def sha(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers for a `hub`."""

    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, tree: object = None, code: int = 200, body: bytes | None = None, **headers: str) -> None:
        body = json.dumps(tree).encode() if body is None else body
        self.send_response(code)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        self.server.hub.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/large/"):
            return self.answer({"error": "Invalid credentials"}, 401)
        handler = {"POST": self.post, "PUT": self.put}.get(self.command, self.get)
        return handler(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def post(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            known = name in self.server.hub.repos
            self.server.hub.repos.setdefault(name, {})
            self.server.hub.private.setdefault(
                name, asked.get("visibility") == "private" or asked.get("private", False)
            )
            return self.answer({"url": f"{self.server.hub.url}/{name}", "id": name}, 409 if known else 200)
        if path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            assert isinstance(head, dict)
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.hub.url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        _, _, _, owner, name, what, *_ = path.split("/")
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith((".safetensors", ".distcp")) else "regular" for f in files}
            return self.answer(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        assert what == "commit", path
        return self.commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])

    def commit(self, repo: str, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.hub.repos[repo][value["path"]] = self.server.hub.large[value["oid"]]
            else:
                self.server.hub.messages.append(value["summary"])
        sha = self.server.hub.sha(repo)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.hub.url}/{repo}/commit/{sha}"})

    def put(self, path: str, body: bytes) -> None:
        oid = path.removeprefix("/large/")
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.hub.large[oid] = body
        self.answer({})

    def get(self, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        api = parts[0] == "api"
        repo = "/".join(parts[2:4] if api else parts[:2])
        if repo not in self.server.hub.repos:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        files, sha = self.server.hub.repos[repo], self.server.hub.sha(repo)
        if api and parts[4:5] == ["tree"]:
            return self.answer([{"type": "file", "path": n, "size": len(c), "oid": sha} for n, c in files.items()])
        if api:
            return self.answer(
                {"id": repo, "sha": sha, "siblings": [{"rfilename": n} for n in files], "private": False}
            )
        content = files["/".join(parts[4:])]
        etag = hashlib.sha256(content).hexdigest()
        return self.answer(body=content, ETag=f'"{etag}"', X_Repo_Commit=sha, Content_Type="application/octet-stream")


@contextmanager
def hub() -> Iterator[Hub]:
    """A Hub on a free port of this machine, empty at first."""
    state = Hub()
    with answering(Server(state)) as state.url:
        yield state
