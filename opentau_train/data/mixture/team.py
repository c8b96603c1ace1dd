"""Rows read by several threads and processes at once: who reads what, so that all read about as many.

It saves time and changes nothing else: one process that reads part after part comes to the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.source import FiledSource, Source

S = TypeVar("S")
T = TypeVar("T")

PART_ROWS = 2**19
"""Rows of a part, about. A row group that two parts share is read twice; memory doesn't depend on it."""
LOOK_SECONDS = 0.2


def parts(source: Source, positions: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The `positions` [N] of episodes in parts for threads to read beside each other: each of about `PART_ROWS` rows,
    with no cut inside smaller files. They follow from the source and the positions alone."""
    files = source.row_files() if isinstance(source, FiledSource) else None
    if files is None or len(positions) == 0:
        return [positions] if len(positions) else []
    ordered = positions[np.lexsort((positions, files[positions]))]
    file, length = files[ordered], source.episodes.length[ordered].astype(np.int64)
    begin = np.cumsum(length) - length
    of_file = begin[np.searchsorted(file, file)]
    place = np.stack([of_file // PART_ROWS, (begin - of_file) // PART_ROWS])
    return np.split(ordered, np.flatnonzero(np.diff(place).any(axis=0)) + 1)


def own_cores() -> set[int]:
    """The processors that this process may use."""
    return os.sched_getaffinity(0) if sys.platform == "linux" else set(range(os.cpu_count() or 1))


def share_of_cores(node: int, gather: Callable[[Any], list[Any]]) -> int:
    """How many processors are this process's of those that it may use, and others of the same `node` may use too: an
    equal share, at least one. Collective."""
    own = own_cores()
    of_node = [cores for other, cores in gather((node, own)) if other == node]
    return max(1, len(own) // max(sum(core in cores for cores in of_node) for core in own))


@dataclass(frozen=True)
class Team:
    """Who reads together: this process is number `rank` of `size`, and has `num_cores` processors.

    `gather` gives all of them the value of every one, in their order, and `agree` raises on all what a call raised on
    one, as those of `World` do. `tell` hears now and then how many rows this process has read, and of how many.
    """

    rank: int = 0
    size: int = 1
    num_cores: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    agree: Callable[[Callable[[], Any]], Any] = lambda make: make()
    tell: Callable[[int, int], None] = lambda done, total: None

    def each(
        self, call: Callable[[S, Callable[[int], None]], T], items: Sequence[S], num_rows: Sequence[int]
    ) -> list[T]:
        """What `call` makes of each item and its `num_rows`, in order, on all processes. Each makes those of a share of
        the rows, on its threads. The second argument is to hear how many rows more have been read.

        Collective. Raises on all what the call of the first item raised whose call did.
        """
        total = max(1, sum(num_rows))
        share = [before * self.size // total for before in accumulate(num_rows, initial=0)]
        own = [i for i in range(len(items)) if share[i] == self.rank]
        return list(chain.from_iterable(self.gather(self.agree(partial(self._own, call, items, num_rows, own)))))

    def _own(self, call: Callable, items: Sequence, num_rows: Sequence[int], own: list[int]) -> list:
        done, total, told = dict.fromkeys(own, 0), sum(num_rows[i] for i in own), 0

        def make(i: int) -> Any:
            def read(num: int) -> None:
                done[i] += num

            return call(items[i], read)

        with ThreadPoolExecutor(max(1, min(self.num_cores, len(own))), "rows") as threads:
            futures = [threads.submit(make, i) for i in own]
            try:
                for future in futures:
                    is_done = False
                    while not is_done:
                        is_done = bool(wait([future], LOOK_SECONDS).done)
                        if sum(done.values()) > told:  # else the watchdog would not see a read that hangs
                            told = sum(done.values())
                            self.tell(told, total)
                    future.result()
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
        return [future.result() for future in futures]


def alone() -> Team:
    """This process by itself, on all its processors."""
    return Team(num_cores=len(own_cores()))
