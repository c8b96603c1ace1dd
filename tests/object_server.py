"""An object server on this machine, and what may happen on the way to it: delays, errors, cut connections.

The objects are moto's, in a process of its own; a proxy in this one counts what is read and makes the faults.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.http_server import answering
from tests.program import environment

BUCKET = "bucket"
AWS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
AWS["AWS_MAX_ATTEMPTS"] = "1"  # botocore's own

Fault = Callable[[str, int], str | None]
"""From a GET's path and how often it was asked for before, this time included: "error", "cut" or None for none."""


@dataclass
class Proxy:
    """What lies between a program and the server at `port` of this machine. `served` {path: bytes of its GETs}."""

    port: int
    url: str = ""
    delay_s: float = 0.0
    fault: Fault = lambda path, number: None
    asked: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        self.delay_s, self.fault = 0.0, lambda path, number: None
        self.asked.clear()
        self.served.clear()

    def count(self, path: str) -> str | None:
        """Note a GET of `path`; gives the fault that it meets."""
        with self._lock:
            self.asked[path] += 1
            return self.fault(path, self.asked[path])

    def serve(self, path: str, num_bytes: int) -> None:
        with self._lock:
            self.served[path] += num_bytes

    def data_bytes(self) -> dict[str, int]:
        """{path: bytes served} of the files of rows and of video."""
        return {
            path: num
            for path, num in sorted(self.served.items())
            if path.endswith((".parquet", ".mp4")) and "/meta/" not in path
        }


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            time.sleep(proxy.delay_s)
            path = self.path.partition("?")[0]
            fault = proxy.count(path) if self.command == "GET" else None
            if fault == "error":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            server = http.client.HTTPConnection("127.0.0.1", proxy.port)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.request(self.command, self.path, body, dict(self.headers))
            answer = server.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            server.close()
            if fault == "cut":
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            if self.command == "GET":
                proxy.serve(path, len(content))
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    """A proxy to the server at `port`."""
    proxy = Proxy(port)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(proxy))
    server.daemon_threads = True
    with answering(server) as proxy.url:
        yield proxy


@contextmanager
def running(arguments: list[str], cwd: Path | None = None) -> Iterator[int]:
    """A server process, `python ARGUMENTS PORT`; gives its port once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *arguments, str(port)]
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            assert process.poll() is None, f"{' '.join(command)} ended"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


@contextmanager
def object_server() -> Iterator[Proxy]:
    """A server of S3's protocol with an empty bucket, behind a proxy; the environment leads s3fs to it."""
    import s3fs

    with running(["-m", "moto.server", "-p"]) as port, proxy_to(port) as proxy:
        # One that this process was led to before, as a worker that comes back to a file of tests, is gone.
        s3fs.S3FileSystem.clear_instance_cache()
        before = dict(os.environ)
        os.environ.update(AWS, AWS_ENDPOINT_URL=proxy.url)
        try:
            _request(port, "PUT", f"/{BUCKET}")
            yield proxy
        finally:
            for name in (*AWS, "AWS_ENDPOINT_URL"):
                del os.environ[name]
            os.environ.update(before)


def upload(proxy: Proxy, root: Path, name: str) -> str:
    """Put the files below `root` into the bucket; gives the directory's URL."""
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        _request(proxy.port, "PUT", f"/{BUCKET}/{name}/{path.relative_to(root).as_posix()}", path.read_bytes())
    return f"s3://{BUCKET}/{name}"


def _request(port: int, method: str, path: str, body: bytes = b"") -> None:
    server = http.client.HTTPConnection("127.0.0.1", port)
    server.request(method, path, body, {"Authorization": "AWS4-HMAC-SHA256 Credential=key/0/us-east-1/s3/aws4_request"})
    answer = server.getresponse()
    assert answer.status in (200, 204), (answer.status, answer.read())
    server.close()
