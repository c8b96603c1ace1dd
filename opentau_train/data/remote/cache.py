"""A folder of whole files with a bound on their bytes, shared by all processes of a node.

A file is written beside its place under a lock of its own and renamed when it is whole, so that each file is written
once however many processes want it, and a process that dies leaves nothing that could be taken for it. What is used
least recently goes first. Locks are `flock`s: they end with the process that holds them. The folder must be on a disk
of the node itself.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

PART = ".part"
"""How the name of a file ends that isn't whole yet."""
KEPT = "meta"
"""The folder of a dataset, which lies at HASH/NAME, from which no file is removed: datasets are opened at any time."""
LEDGER = ".ledger"
FILL_LEVEL = 0.9
"""What a removal leaves of the capacity, so that it isn't due again for the next file."""
WAIT_S = 0.05


class TooLarge(Exception):
    """A file doesn't fit into the cache beside the metadata: together they have `num_bytes`."""

    def __init__(self, num_bytes: int):
        super().__init__(num_bytes)
        self.num_bytes = num_bytes


@dataclass(frozen=True)
class Cache:
    """The folder `folder`, which says itself how many bytes it may hold (`resize`).

    A removed file that is still open keeps its place on the disk until it is closed.
    """

    folder: Path

    @property
    def capacity(self) -> int:
        """The bytes that it may hold."""
        return _Ledger.of((self.folder / LEDGER).read_bytes()).capacity

    def resize(self, capacity: int) -> None:
        """Let it hold `capacity` bytes from now on; what is too much goes when the next file comes. Raises OSError
        where the folder can't be written."""
        with self._ledger() as ledger:
            ledger.capacity = capacity

    def fill(self, path: Path, size: int, write: Callable[[BinaryIO], object]) -> None:
        """See to it that the file `path` of `size` bytes is there, written by `write` unless it was there before, and
        is counted as just used.

        Raises what `write` raises, after which the file is absent, `TooLarge`, and OSError where the folder can't be
        written.
        """
        part = path.with_name(f".{path.name}{PART}")
        while not _touch(path):
            part.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # Whoever held the lock has renamed or removed the file; or `path` came and went before this one.
                if _is_at(lock, part) and not path.exists():
                    self._write(part, path, size, write)

    def _write(self, part: Path, path: Path, size: int, write: Callable[[BinaryIO], object]) -> None:
        while not self._reserve(part, size):
            time.sleep(WAIT_S)  # others' unfinished files take the room, and soon are files that can go
        try:
            with open(part, "r+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # a renamed file whose content a power cut lost would pass for whole
            with self._ledger():  # a count of the folder sees it once, under the one name or the other
                os.rename(part, path)
        except BaseException:
            # Broad, and raised again: whatever ends the writing, what was written is no file.
            with self._ledger() as ledger:
                part.unlink(missing_ok=True)
                ledger.used -= size
            raise

    def _reserve(self, part: Path, size: int) -> bool:
        """Make room for `size` bytes and give them to `part`; False where unfinished files leave too little."""
        with self._ledger() as ledger:
            if ledger.used + size > ledger.capacity:
                ledger.used = self._make_room(size, ledger.capacity)
            if ledger.used + size > ledger.capacity:
                return False
            os.truncate(part, size)  # so that a count of the folder has it in full
            ledger.used += size
            return True

    def _make_room(self, size: int, capacity: int) -> int:
        """Remove the least recently used files until `size` more bytes fit; gives the bytes of those that are left.
        Raises `TooLarge` where they never will."""
        used, kept, files = 0, 0, []
        for path in _files(self.folder):
            status = path.stat()
            if path.name.endswith(PART):
                if _abandoned(path):
                    continue
            elif path.relative_to(self.folder).parts[2] == KEPT:
                kept += status.st_size
            else:
                files.append((status.st_mtime_ns, status.st_size, path))
            used += status.st_size
        if kept + size > capacity:
            raise TooLarge(kept + size)
        for _, freed, path in sorted(files):
            if used <= max(0, int(FILL_LEVEL * capacity) - size):
                break
            path.unlink()
            used -= freed
        return used

    @contextmanager
    def _ledger(self) -> Iterator[_Ledger]:
        """What the folder holds and may hold, for this process alone to read and change. Files that somebody removed by
        hand are still counted: the next removal, which counts anew, puts it right."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = os.open(self.folder / LEDGER, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            ledger = _Ledger.of(os.pread(file, 64, 0))
            before = replace(ledger)
            try:
                yield ledger
            finally:
                if ledger != before:  # in one write: who is killed leaves the old numbers or the new ones
                    os.pwrite(file, str(ledger).encode(), 0)
        finally:
            os.close(file)


@dataclass
class _Ledger:
    """Bytes: those of the files, the unfinished ones included, and those that there may be."""

    used: int = 0
    capacity: int = 0

    def __str__(self) -> str:
        return f"{self.used:20d} {self.capacity:20d}"  # of one length: it is written over the old one

    @classmethod
    def of(cls, text: bytes) -> _Ledger:
        return cls(*(int(number) for number in text.split()))


def _files(folder: Path) -> Iterator[Path]:
    """All files below the folder's sub-folders; the ledger, which lies beside them, isn't one."""
    for inner in folder.iterdir():
        if inner.is_dir():
            yield from (path for path in inner.rglob("*") if path.is_file())


def _touch(path: Path) -> bool:
    """Count the file as used now; False where it isn't there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _abandoned(part: Path) -> bool:
    """Whether nobody writes the unfinished file any more; it is gone then."""
    try:
        with open(part, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
    except BlockingIOError:
        return False
    return True
