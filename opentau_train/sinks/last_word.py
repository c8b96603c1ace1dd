"""The error that ends a run, told once, by rank 0, since every rank would say the same."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

HEAD_START_S = 20.0
"""Seconds that rank 0 has to report an error that all ranks found: the others wait so long before they end."""


def tell_once(text: str) -> None:
    """By rank 0, at once. The others wait before they end: torchrun kills all ranks as soon as one has ended, and rank
    0 may not have spoken yet. One that is left alone failed alone, and says so itself."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(HEAD_START_S)
    sys.stderr.write(f"error: {text}\n")


def tell_last(text: str) -> None:
    """As the last thing on the screen. Torchrun's agent prints its traceback and a summary after the ranks have ended:
    rank 0 leaves the text to it, whom it takes for the cause. Another rank of the node then waits to be ended."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:  # no torchrun, or one that keeps no files
        return tell_once(text)
    path, rank = Path(file), os.environ.get("RANK", "0")
    if not (_left_to_agent(path, text) if rank == "0" else _appears(path.parents[1] / "0" / path.name)):
        sys.stderr.write(f"error: {text}\n")


def _left_to_agent(path: Path, text: str) -> bool:
    """Write the file of which torchrun makes its summary, as its own `record` does."""
    shown = {"py_callstack": f"\nerror: {text}", "timestamp": str(int(time.time()))}
    try:
        path.write_text(json.dumps({"message": {"message": text, "extraInfo": shown}}), encoding="utf-8")
    except OSError:
        return False
    return True


def _appears(path: Path) -> bool:
    """Whether the file is there in time; if so, some more time has passed in which the agent may end this rank."""
    end = time.monotonic() + HEAD_START_S
    while time.monotonic() < end and not path.exists():
        time.sleep(HEAD_START_S / 200)
    if path.exists():
        time.sleep(HEAD_START_S / 10)
    return path.exists()
