"""Starts `tools.serve` as a process of its own, and sends it what a client does, well or badly."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import websockets.sync.client as plain

from tests import warm
from tests.program import environment


@dataclass
class Served:
    process: subprocess.Popen
    port: int
    lines: list[str]

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code after a signal; what it had printed joins `lines`."""
        self.process.send_signal(number)
        self.lines += self.process.communicate(timeout=60)[0].splitlines()
        return self.process.returncode


@contextmanager
def serving(checkpoint: Path, *words: str, **env: str) -> Iterator[Served]:
    """A server at a free port, ended when the block ends."""
    command = [sys.executable, "-m", "opentau_train.tools.serve", f"checkpoint={checkpoint}", "port=0", *words]
    process = warm.Popen(command, env=environment(**env), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines: list[str] = []
    try:
        yield Served(process, _port(process, lines), lines)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _port(process: subprocess.Popen, lines: list[str], seconds: float = 100.0) -> int:
    """The port that it says; raises where it ends before, or is ended for having said none in `seconds`."""
    too_late = threading.Timer(seconds, process.kill)
    too_late.start()
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            found = re.search(r"at ws://[^ ]+:(\d+)$", lines[-1])
            if found:
                return int(found[1])
    finally:
        too_late.cancel()
    raise AssertionError("\n".join(["the server didn't begin to serve", *lines]))


def observed(number: int = 0) -> dict[str, Any]:
    """What the tests' own policy sees, each number something else."""
    random = np.random.default_rng(number)
    return {
        "front": random.integers(0, 256, (64, 96, 3), np.uint8),
        "side": random.integers(0, 256, (48, 64, 3), np.uint8),
        "state": random.normal(size=4).astype(np.float32),
        "task": "open the drawer",
    }


def connect(served: Served, **options: Any) -> Any:
    """A connection that speaks no protocol above the websocket's. Its first message is the metadata."""
    return plain.connect(served.url, compression=None, max_size=None, **options)
