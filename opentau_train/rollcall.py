"""Who is gone? When a collective breaks, the ranks that are left answer to their names, and the others are told.

A killed process takes its connections with it: its peers see a closed socket, and on other machines torchrun's own
summary blames one of them. The launch's store, which needs no collective, knows better.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from opentau_train.errors import Fault

ANSWER_SECONDS = 15.0
"""How long ranks of other machines have to answer: below the 30 s that torchrun leaves the ranks of a node of which one
has ended. A process of this machine that is no more is known at once."""


def is_broken_collective(error: BaseException) -> bool:
    """Whether `error` is what a collective raises whose peers are gone. Gloo has no class of its own for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class RollCall:
    """This rank's name in the launch's store, and the question for the others. Makes 1 request when it is built."""

    def __init__(self, store: Store, rank: int, size: int):
        self._store, self._rank, self._size = PrefixStore("rollcall", store), rank, size
        self._store.set(f"place/{rank}", json.dumps([socket.gethostname(), os.getpid()]))

    def explain(self, error: BaseException) -> Fault | None:
        """What is behind `error`, on the rank that raised it; None where it speaks for itself, or nothing is known.

        Not collective: each rank that failed asks for itself, and every other one that lives soon fails too. The first
        one of a node tells it.
        """
        broken = is_broken_collective(error)
        said = "" if broken else f"{type(error).__name__}: {error}".partition("\n")[0]
        try:
            self._store.set(f"answer/{self._rank}", said or " ")
            fault = self._judge() if broken else None
            if fault is not None:
                fault.told_here = self._store.add(f"told/{socket.gethostname()}", 1) == 1
            return fault
        except (dist.DistError, RuntimeError):  # the store's process is gone: it is on rank 0's node
            return Fault(
                "the connection to rank 0's node is lost: it, or the launcher on it, is gone",
                where=f"seen by rank {self._rank} on {socket.gethostname()}",
                remedy="look at that node's log; start again with resume=auto",
            )

    def _judge(self) -> Fault | None:
        end, missing = time.monotonic() + ANSWER_SECONDS, self._missing()
        while missing and time.monotonic() < end and not any(self._is_dead(rank) for rank in missing):
            time.sleep(0.2)
            missing = self._missing()
        answers = {r: self._get(f"answer/{r}").strip() for r in range(self._size) if r not in missing}
        failed = next((r for r, said in answers.items() if said), None)
        if failed is not None:
            return Fault(
                f"rank {failed} failed: {answers[failed]}",
                where=self._place(failed),
                remedy="look at its traceback; once that is mended, go on with resume=auto",
            )
        gone = [r for r in missing if self._is_dead(r)] or missing
        if not gone:
            return None
        more = f" (and {len(gone) - 1} more: {', '.join(map(str, gone[1:8]))})" if len(gone) > 1 else ""
        return Fault(
            f"rank {gone[0]}{more} is gone: killed, crashed, or its node is down; the other ranks end",
            where=self._place(gone[0]),
            remedy="look at its log, and at dmesg for memory that ran out; go on with the same command and resume=auto",
        )

    def _missing(self) -> Sequence[int]:
        return [r for r in range(self._size) if not self._store.check([f"answer/{r}"])]

    def _get(self, key: str) -> str:
        self._store.wait([key], timedelta(seconds=ANSWER_SECONDS))
        return self._store.get(key).decode()

    def _place(self, rank: int) -> str:
        host, pid = json.loads(self._get(f"place/{rank}"))
        return f"{host}, process {pid}"

    def _is_dead(self, rank: int) -> bool:
        """Whether that is certain: a process of this machine that is no more."""
        host, pid = json.loads(self._get(f"place/{rank}"))
        if host != socket.gethostname():
            return False
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return Path("/proc/self").exists()  # where there is no /proc, nothing is certain
        return state in "ZX"
