"""Whose words are the last ones on a screen, where several ranks have found the same mistake."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

HEAD_START_S = 20.0
"""Seconds that rank 0 has to report a mistake that all ranks found: the others wait so long before they end."""


def told_by_agent(text: str) -> bool:
    """Leave a mistake to torchrun's agent: its summary of the failed ranks is the last thing on a screen. Rank 0 does,
    whom the agent takes for the cause; another rank of its node then waits to be ended. False: this rank speaks.
    """
    path, end = os.environ.get("TORCHELASTIC_ERROR_FILE"), time.monotonic() + HEAD_START_S
    if os.environ.get("RANK", "0") != "0":
        first = Path(path).parents[1] / "0" / Path(path).name if path else None
        while time.monotonic() < end:
            if first is not None and first.exists():
                time.sleep(HEAD_START_S / 10)
                return True
            time.sleep(HEAD_START_S / 200)
        return False
    if not path:  # no torchrun, or one that keeps no files
        return False
    shown = {"py_callstack": f"\nerror: {text}", "timestamp": str(int(time.time()))}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": shown}}, file)
    except OSError:
        return False
    return True


def print_once(text: str) -> None:
    """By rank 0, since every rank would say the same. The others wait before they end: torchrun kills all ranks as soon
    as one has ended, and rank 0 may not have spoken yet. One that is left alone failed alone, and says so itself."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(HEAD_START_S)
    sys.stderr.write(f"error: {text}\n")
