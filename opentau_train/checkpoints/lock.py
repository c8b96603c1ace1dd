"""One launch at a time writes a run directory: `RUN/lock`, which rank 0 holds for all ranks of its launch.

It is held in two ways, since neither is enough. `flock` ends with the process, at once, but not every file server
carries it to other machines. So the file also says who holds it, with a count that rises every `RENEW_SECONDS`: a
holder on another machine whose count stands still for `STALE_SECONDS` is gone. No clocks of two machines are compared.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from opentau_train.distributed.rollcall import is_dead
from opentau_train.errors import Fault, UserError

log = logging.getLogger(__name__)

NAME = "lock"
RENEW_SECONDS = 5.0
STALE_SECONDS = 30.0
LEFT_SECONDS = 10.0
"""How long the children of a holder that is dead may keep its lock: they end when they notice."""
SETTLE_SECONDS = 1.0
"""Where there is no `flock`: how long to wait for another launch that took the lock at the same moment."""


class RunDirLost(Fault):
    """The run directory was removed, replaced, or taken by another run, while this one writes it."""


class Lock:
    """The lock of `run_dir`, which is made; held until `release`. Raises `UserError` naming the holder where another
    run holds it, and OSError where the directory can't be written. `handle`: its open file."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.path = run_dir, run_dir / NAME
        self._own = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "start": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": shlex.join(sys.argv),
            "machine": _machine(),
            "token": uuid.uuid4().hex,
        }
        self._made = not run_dir.exists()
        run_dir.mkdir(parents=True, exist_ok=True)
        self.handle = self._acquired()
        self._done = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._renewing.start()

    def check(self) -> None:
        """Raises `RunDirLost` where the path leads no more to what was locked, or another run has taken it. That a file
        server doesn't answer says neither."""
        try:
            os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            is_gone = True
        except OSError:
            return
        else:
            is_gone = not self._is_there(self.handle)
        holder = self._holder()
        if not is_gone and holder.get("token", self._own["token"]) == self._own["token"]:
            return
        what = f"another run has taken the run directory: {_words(holder)}" if holder else "the run directory is gone"
        raise RunDirLost(f"{what}, or another one is in its place", where=str(self.run_dir))

    def release(self) -> None:
        """Let others have it. A directory that was made for the lock, and has nothing else in it, goes."""
        self._done.set()
        self._renewing.join()
        with suppress(OSError, RunDirLost):
            self.check()
            self.path.unlink()
            if self._made:
                self.run_dir.rmdir()
        os.close(self.handle)

    def _acquired(self) -> int:
        """The open file, locked and written."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                by_system = self._flock(file)
                if not self._is_there(file):  # its holder has just released it
                    os.close(file)
                    continue
                self._wait_for_holder(by_system)
                self._write(file, 0)
                if not by_system:
                    time.sleep(SETTLE_SECONDS)
                    if (other := self._holder()).get("token") != self._own["token"]:
                        raise self._refusal(other)
            except BaseException:
                # Broad, and raised again: whatever keeps the lock from being had, an interrupt too, its file is closed.
                os.close(file)
                raise
            return file

    def _flock(self, file: int) -> bool:
        """Whether the system has locked the file; False where the file server has no such locks. Raises `UserError`."""
        end = time.monotonic() + LEFT_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                holder = self._holder()
                if not self._died_here(holder) or time.monotonic() > end:
                    raise self._refusal(holder) from None
                time.sleep(0.2)
            except OSError:
                return False

    def _wait_for_holder(self, by_system: bool) -> None:
        """Return when whoever the file names is gone. Raises `UserError` when it lives."""
        first = self._holder()
        if not first or self._died_here(first) or (by_system and first.get("machine") == self._own["machine"]):
            return
        log.warning("%s: does its holder live? It has %g s to show it: %s", self.path, STALE_SECONDS, _words(first))
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            if (now := self._holder()) != first:
                raise self._refusal(now)
            time.sleep(min(1.0, STALE_SECONDS / 4))

    def _died_here(self, holder: dict[str, Any]) -> bool:
        return holder.get("machine") == self._own["machine"] and is_dead(holder["process"])

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        return UserError(
            f"another run is writing this run directory: {_words(holder)}",
            where=f"paths.run_dir={self.run_dir}",
            remedy="wait for its end, end it, or choose another paths.run_dir",
        )

    def _holder(self) -> dict[str, Any]:
        """What the file says now, opened anew: a file server shows it then as it is there. {} where it says nothing."""
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}

    def _is_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(file))
        except OSError:
            return False

    def _write(self, file: int, count: int) -> None:
        """In place and always as long, so that it needs no room on a disk that is full."""
        text = json.dumps({**self._own, "count": f"{count:012d}"}, indent=1) + "\n"
        os.pwrite(file, text.encode(), 0)
        os.ftruncate(file, len(text.encode()))
        os.fsync(file)

    def _renew(self) -> None:
        count = 0
        while not self._done.wait(RENEW_SECONDS):
            with suppress(OSError, RunDirLost):  # `check` tells the main thread
                self.check()
                self._write(self.handle, count := count + 1)


def _words(holder: dict[str, Any]) -> str:
    if not holder:
        return "it hasn't said yet who it is"
    return f"{holder['host']}, process {holder['process']}, since {holder['start']}: {holder['command']}"


def _machine() -> str:
    """Where process numbers mean the same; the host's name where the system doesn't tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()
