"""Who is gone? When a collective breaks, the ranks that are left answer to their names, and the others are told.

A killed process takes its connections with it: its peers see a closed socket, and on other machines torchrun's own
summary blames one of them. The launch's store, which needs no collective, knows better.
"""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from opentau_train.errors import Explained, Fault, Teller

ANSWER_SECONDS = 15.0
"""How long ranks of other machines have to answer: below the 30 s that torchrun leaves the ranks of a node of which one
has ended. A process of this machine that is no more is known at once."""


def is_broken_collective(error: BaseException) -> bool:
    """Whether `error` is what a collective raises whose peers are gone. Gloo has no class of its own for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class RollCall:
    """Puts this rank's name into the launch's store, and asks there which others are gone. Makes 3 requests when it is
    built.

    One rank of a node asks, in a few requests a second and some 12 for each rank that it must find among thousands.
    """

    def __init__(self, store: Store, rank: int, size: int):
        self._store, self._rank, self._size = PrefixStore("rollcall", store), rank, size
        self._host, pid = socket.gethostname(), os.getpid()
        self._store.set(f"place/{rank}", f"{self._host}, process {pid}")
        number = self._store.add(f"ranks/{self._host}", 1)
        self._store.set(f"host/{self._host}/{number}", f"{rank}:{pid}")

    def explain(self, error: BaseException) -> Fault | None:
        """What is behind `error`, on the rank that raised it; None where it speaks for itself, or nothing is known.

        Not collective: each rank that failed answers for itself, and every other one that lives soon fails too. The
        first one of a node asks the others and reports.
        """
        broken = is_broken_collective(error)
        try:
            if not broken and self._store.add("failures", 1) == 1:
                name = "" if isinstance(error, Explained) else f"{type(error).__name__}: "
                message = f"{name}{error}".partition("\n")[0]
                self._store.set("failed", json.dumps([self._rank, message]))
            self._store.set(f"answer/{self._rank}", "here")
            self._store.add("answers", 1)
            if not broken:
                return None
            if self._store.add(f"reported/{self._host}", 1) == 1:
                return self._find_out()
            return Fault("a collective broke; another rank of this node tells why", teller=Teller.ANOTHER_RANK)
        except (dist.DistError, RuntimeError):  # the store's process is gone: it is on rank 0's node
            if not broken:
                return None  # an error of this rank's own is told, whoever hears it
            return Fault(
                "the connection to rank 0's node is lost: it, or the launcher on it, is gone",
                where=f"seen by rank {self._rank} on {self._host}",
                remedy="look at that node's log; start again with resume=auto",
            )

    def all_meet(self, place: str) -> bool:
        """Whether all ranks call this with the same `place`, within `ANSWER_SECONDS` of this one. No collective: others
        may be inside of one."""
        end, here = time.monotonic() + ANSWER_SECONDS, self._store.add(f"meet/{place}", 1)
        while here < self._size and time.monotonic() < end:
            time.sleep(0.2)
            here = self._store.add(f"meet/{place}", 0)
        return here >= self._size

    def _find_out(self) -> Fault | None:
        end = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < end and not self._settled():
            time.sleep(0.2)
        if self._store.check(["failed"]):
            rank, message = json.loads(self._get("failed"))
            return Fault(
                f"rank {rank} failed: {message}",
                where=self._get(f"place/{rank}"),
                remedy="look at what it printed; once that is mended, go on with resume=auto",
                teller=Teller.THIS_RANK,
            )
        # A process of this machine that lives and is silent is in something else: that is the watchdog's business.
        gone = self._dead_here() or [r for r in self._missing(0, self._size) if r not in self._here()]
        if not gone:
            return None
        more = f" (and {len(gone) - 1} more: {', '.join(map(str, gone[1:8]))})" if len(gone) > 1 else ""
        return Fault(
            f"rank {gone[0]}{more} is gone: killed, crashed, or its node is down; the other ranks end",
            where=self._get(f"place/{gone[0]}"),
            remedy="look at its log, and at dmesg for memory that ran out; go on with the same command and resume=auto",
            teller=Teller.THIS_RANK,
        )

    def _settled(self) -> bool:
        """Whether nothing more is to be learned by waiting."""
        return self._store.check(["failed"]) or self._store.add("answers", 0) >= self._size or bool(self._dead_here())

    def _here(self) -> dict[int, int]:
        """{rank: process} of this machine."""
        known = range(1, self._store.add(f"ranks/{self._host}", 0) + 1)
        pairs = (self._get(f"host/{self._host}/{number}").split(":") for number in known)
        return {int(rank): int(pid) for rank, pid in pairs}

    def _dead_here(self) -> list[int]:
        """Ranks of this machine that ended without an answer."""
        dead = [rank for rank, pid in self._here().items() if is_dead(pid)]
        return [rank for rank in dead if not self._store.check([f"answer/{rank}"])]

    def _missing(self, first: int, end: int) -> list[int]:
        """The ranks of `first` .. `end` - 1 without an answer, by halving."""
        if self._store.check([f"answer/{rank}" for rank in range(first, end)]):
            return []
        middle = (first + end) // 2
        return [first] if end - first == 1 else self._missing(first, middle) + self._missing(middle, end)

    def _get(self, key: str) -> str:
        self._store.wait([key], timedelta(seconds=ANSWER_SECONDS))
        return self._store.get(key).decode()


def is_dead(pid: int) -> bool:
    """Whether the process `pid` of this machine is certainly dead."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return Path("/proc/self").exists()  # where there is no /proc, nothing is certain
    return state in "ZX"
