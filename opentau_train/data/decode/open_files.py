"""The files that a process keeps open to read on in them: few enough for the operating system's limit."""

from __future__ import annotations

import errno
import itertools
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import ClassVar, Generic, Protocol, TypeVar
from weakref import WeakSet

SPARE_FILES = 32
"""File descriptors that are kept free for what else a process opens: sockets, logs, checkpoints."""


class _Closable(Protocol):
    def close(self) -> None: ...


K = TypeVar("K", bound=Hashable)
F = TypeVar("F", bound=_Closable)


class OpenFiles(Generic[K, F]):
    """One owner's open files by name, at most `capacity`. The limit is the process's, so all owners in it make room for
    each other: where it comes near, the file that was used least recently is closed, whose ever it is. A name that is
    asked for again is opened again. One that reads `apart`, beside others on threads of their own, closes its own files
    only, and nobody else does."""

    _owners: ClassVar[WeakSet[OpenFiles]] = WeakSet()
    _uses: ClassVar[itertools.count[int]] = itertools.count()

    def __init__(self, open_file: Callable[[K], F], capacity: int, *, apart: bool = False):
        self.capacity, self._open_file = capacity, open_file
        self._files: OrderedDict[K, tuple[int, F]] = OrderedDict()  # {name: (when it was used last, file)}, by use
        self._sharing = WeakSet([self]) if apart else self._owners
        self._sharing.add(self)

    def __len__(self) -> int:
        return len(self._files)

    def get(self, name: K) -> F:
        """The file, opened if it isn't: good until the next `get` of any owner. Raises what opening it raises."""
        known = self._files.pop(name, None)
        if known is None:
            self.shrink(self.capacity - 1)
            self._make_room()
        file = self._open_file(name) if known is None else known[1]
        self._files[name] = next(self._uses), file
        return file

    def drop(self, name: K) -> None:
        """Close the file if it is open."""
        known = self._files.pop(name, None)
        if known is not None:
            known[1].close()

    def shrink(self, size: int) -> None:
        """Close the files used least recently, but for `size`."""
        while len(self._files) > max(size, 0):
            self._files.popitem(last=False)[1][1].close()

    def _make_room(self) -> None:
        while few_files_left():
            oldest = min((owner for owner in self._sharing if owner), key=OpenFiles._last_use, default=None)
            if oldest is None:
                return  # all is others': opening tells whether it still goes
            oldest.shrink(len(oldest) - 1)

    def _last_use(self) -> int:
        """When the file was used that was used least recently."""
        return next(iter(self._files.values()))[0]


def raise_file_limit() -> None:
    """Let this process and those that it starts open as many files as the machine's hard limit allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except ValueError:  # macOS: its hard limit is larger than what it lets a process have
        return


def few_files_left() -> bool:
    """Whether this process comes near its limit of open files, whoever holds them."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return False
    try:
        lowest_free = os.open(os.devnull, os.O_RDONLY)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return True
    os.close(lowest_free)
    return lowest_free >= limit - min(SPARE_FILES, limit // 4)
