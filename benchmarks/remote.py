"""What reading from a server costs: the wait for data against local files, at 20 ms a request.

    python benchmarks/remote.py [--latency 20] [--step 100] [--steps 60]

Writes a dataset of a file an episode and a camera (h264 96x128), serves it from this machine by HTTP with ranges, every
answer delayed by the latency, and reads the training stream with 2 workers. Each step waits for its batch, then works
for `--step` milliseconds, as a training step on an accelerator does. The sides:

- `local`: the files on the disk;
- `remote, cold`: from the server into an empty cache;
- `remote, warm`: again, the cache having it all;
- `remote, cold, nothing ahead`: as `cold`, but each file is fetched when it is opened.

For each: seconds to the first batch, then over the other steps the median, mean and 95th percentile of the wait, and
how many requests and MB the server gave.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from contextlib import closing, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from support.datasets import write_dataset
from support.program import machine, mixture_of

from opentau_train.data.load import stream
from opentau_train.data.load.fetching import files_fetched

EPISODES, LENGTH, BATCH, SIZE = 96, 30, 8, (96, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=20.0, help="milliseconds before each answer")
    parser.add_argument("--step", type=float, default=100.0, help="milliseconds of work a step")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    print(f"{machine()}; batch {BATCH}, 2 workers, {options.latency:g} ms latency, steps of {options.step:g} ms\n")
    print("| files | first batch, s | median wait, ms | mean, ms | 95 %, ms | requests | MB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = write_dataset(Path(folder) / "set", [LENGTH] * EPISODES, size=SIZE, episodes_per_file=1)
        with served(root.parent, options.latency / 1e3) as server:
            url = f"http://127.0.0.1:{server.server_address[1]}/set"
            sides = {"local": root, "remote, cold": url, "remote, warm": url, "remote, cold, nothing ahead": url}
            for name, given in sides.items():
                if "cold" in name:
                    shutil.rmtree(Path(folder) / "cache", ignore_errors=True)
                stream.files_fetched = files_fetched if "nothing" not in name else lambda mixture, plan: plan
                print_side(name, given, Path(folder), server, options)


def print_side(name: str, root: Path | str, folder: Path, server: Server, options: argparse.Namespace) -> None:
    mixture = mixture_of(root, "data.num_workers=2", cache=folder / "cache")
    server.requests = server.sent = 0
    waits = []
    batches = stream.training_batches(
        mixture,
        mixture.tape(BATCH),
        rank=0,
        size=1,
        first_step=0,
        last_step=options.steps,
        quarantine=folder / "quarantine.jsonl",
    )
    with closing(batches):
        for _ in range(options.steps):
            started = time.perf_counter()
            assert next(batches).error is None
            waits.append(time.perf_counter() - started)
            time.sleep(options.step / 1e3)
    first, rest = waits[0], 1e3 * np.array(waits[1:])
    wait = f"{np.median(rest):.1f} | {rest.mean():.1f} | {np.quantile(rest, 0.95):.1f}"
    print(f"| {name} | {first:.2f} | {wait} | {server.requests} | {server.sent / 1e6:.1f} |", flush=True)


class Server(ThreadingHTTPServer):
    """Counts what it gives, each answer `delay_s` late."""

    daemon_threads = True
    delay_s = 0.0
    requests = sent = 0
    lock = threading.Lock()


class Handler(SimpleHTTPRequestHandler):
    """Files with ranges."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        time.sleep(self.server.delay_s)
        path = Path(self.translate_path(self.path))
        asked = self.headers.get("Range")
        if asked is None or not path.is_file():
            return super().do_GET()
        start, _, stop = asked.removeprefix("bytes=").partition("-")
        content = path.read_bytes()[int(start) : int(stop) + 1]
        with self.server.lock:
            self.server.requests += 1
            self.server.sent += len(content)
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path, delay_s: float):
    server = Server(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.delay_s = delay_s
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    main()
