"""Files fetched before they are read: in a reader's own order, on threads, no further ahead than it makes sense."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from opentau_train.data.remote.mirror import Mirror
from opentau_train.data.remote.server import THREADS
from opentau_train.threads import in_background, settle

T = TypeVar("T")

Wanted = Iterable[tuple[Mirror, Path]]

SHARE = 1 / 16
"""Of the cache, what one reader may have fetched ahead: more would push out what the others are reading."""


def fetch_ahead(items: Iterable[T], wanted: Callable[[T], Wanted], num_ahead: int) -> Iterator[T]:
    """`items` as they are. The files `wanted` for an item are being fetched when it is `num_ahead` items away, or less
    where they are large. A file that can't be had is told by whoever opens it."""
    waiting: deque[tuple[T, float]] = deque()  # with the share of the cache that its files take
    coming, share = iter(items), 0.0
    with closing(_Fetchers()) as fetchers:
        while True:
            while not waiting or (len(waiting) <= num_ahead and share <= SHARE):
                item = next(coming, None)
                if item is None:
                    break
                files = list(wanted(item))
                for mirror, path in files:
                    fetchers.ask(mirror, path)
                waiting.append((item, sum(mirror.size(path) / mirror.cache.capacity for mirror, path in files)))
                share += waiting[-1][1]
            if not waiting:
                return
            item, taken = waiting.popleft()
            share -= taken
            yield item


class _Fetchers:
    """Threads that fetch the files they are asked for, in that order. The end of the program waits for none."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._closed = False
        for _ in range(THREADS):
            in_background(self._serve, "fetch")

    def ask(self, mirror: Mirror, path: Path) -> None:
        self._asked.put(partial(mirror.fetch, path))

    def close(self) -> None:
        """Fetch nothing more; what is under way goes on."""
        self._closed = True
        for _ in range(THREADS):
            self._asked.put(None)

    def _serve(self) -> None:
        while (call := self._asked.get()) is not None and not self._closed:
            settle(call)
