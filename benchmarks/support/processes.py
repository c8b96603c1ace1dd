"""The processes of a launch, as /proc shows them: whom a benchmark may kill, and when all are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path


def children(pid: int) -> list[int]:
    """Those of the process's main thread and its other threads; none of a process that is gone."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return found + [deeper for child in found for deeper in descendants(child)]


def alive(pid: int) -> bool:
    """False for one that is gone, or dead and not yet waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def victims(pid: int, ranks: int, hosts: bool = False) -> dict[str, list[int]]:
    """{kind: processes} of a launch whose first process is `pid`: the agent of torchrun where there are several ranks,
    or the shell that started one on each of several `hosts`.

    Kinds that have no process now are left out; `all` has every one. A loader worker is a process below a rank that has
    no children and isn't Python's resource tracker.
    """
    agents = ([pid] if not hosts else children(pid)) if ranks > 1 else []
    ours = [child for agent in agents for child in children(agent) if "opentau" in _command(child)]
    of_ranks = ours if ranks > 1 else [pid]
    below = [worker for rank in of_ranks for worker in descendants(rank)]
    workers = [p for p in below if not children(p) and "resource_tracker" not in _command(p)]
    kinds = {
        "rank": of_ranks,
        "worker": workers,
        "agent": agents,
        "all": [pid, *descendants(pid)],
    }
    return {kind: pids for kind, pids in kinds.items() if pids}


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_gone(process: subprocess.Popen, others: list[int], seconds: float) -> bool:
    """Wait until the launch's first process and `others` are gone; False, and they are killed, after `seconds`."""
    end = time.monotonic() + seconds
    while process.poll() is None or any(map(alive, others)):
        if time.monotonic() > end:
            kill([process.pid, *others])
            process.wait()
            return False
        time.sleep(0.02)
    return True


def _command(pid: int) -> str:
    """Its name and its arguments."""
    try:
        return Path(f"/proc/{pid}/comm").read_text() + Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
