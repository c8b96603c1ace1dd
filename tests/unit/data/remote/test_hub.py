"""`hf://` URLs: the Hub's own client against a server of this machine that answers as the Hub does."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from opentau_train import cli
from opentau_train.config.settings import load_settings
from opentau_train.data.mixture.open import open_mixture
from opentau_train.errors import UserError
from tests.program import DATA, TINY_POLICY, run

ROOT = DATA / "lerobot_v30"
REVISION = "v3.0"


class Hub(BaseHTTPRequestHandler):
    """The dataset OWNER/NAME with the files of `ROOT` at one revision: its listing, and files with ranges."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/datasets/owner/name/tree/{REVISION}"):
            files = sorted(p for p in ROOT.rglob("*") if p.is_file())
            entries = [
                {"type": "file", "oid": str(i), "path": p.relative_to(ROOT).as_posix()} for i, p in enumerate(files)
            ]
            self.answer(json.dumps([e | {"size": p.stat().st_size} for e, p in zip(entries, files)]).encode())
        elif path.startswith("/api/datasets/owner/name"):
            self.answer(json.dumps({"id": "owner/name", "sha": "a" * 40}).encode())
        elif path.startswith(f"/datasets/owner/name/resolve/{REVISION}/"):
            content = (ROOT / path.partition(f"/{REVISION}/")[2]).read_bytes()
            start, _, stop = self.headers["Range"].removeprefix("bytes=").partition("-")
            self.answer(content[int(start) : int(stop) + 1], 206)
        else:
            self.answer(b"{}", 404)

    do_HEAD = do_GET

    def answer(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_trained_on_without_being_downloaded_first(endpoint, tmp_path):
    given = ["+recipe=lerobot", f"data.sources.main.root=hf://datasets/owner/name@{REVISION}", "trainer.steps=1"]
    given += [*TINY_POLICY, "data.num_workers=0", "trainer.global_batch_size=2", f"paths.run_dir={tmp_path / 'run'}"]
    done = run([*given, f"paths.cache_dir={tmp_path / 'cache'}"], HF_ENDPOINT=endpoint)  # read where it is imported
    assert done.returncode == 0, done.stderr
    (root,) = (tmp_path / "cache" / "remote").glob("*/name@v3.0")
    fetched = {p.relative_to(root): p.read_bytes() for p in root.rglob("*.*") if p.is_file() and p.name[0] != "."}
    assert {p.suffix for p in fetched} == {".json", ".parquet", ".mp4"}
    assert all(content == (ROOT / name).read_bytes() for name, content in fetched.items())


def test_a_revision_beside_a_url_is_refused_with_the_url_that_has_it(tmp_path):
    given = ["+recipe=lerobot", "data.sources.main.root=hf://datasets/owner/name", "data.sources.main.revision=v3.0"]
    with pytest.raises(UserError) as caught:
        open_mixture(load_settings(cli.compose(given)))
    assert "hf://datasets/OWNER/NAME@REVISION" in caught.value.remedy
