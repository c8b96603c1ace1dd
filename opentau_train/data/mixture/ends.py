"""The two ends of values that come in pieces: their exact quantiles, without all of them in memory or in one process.

It saves memory and changes nothing else: `numpy.quantile` of all values at once gives the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.mixture.heads import Head

QUANTILE_ROWS = 2**26
"""Rows that quantiles are of: every k-th one with the smallest k that fits, all of them on smaller data."""
QUANTILES = np.array([0.01, 0.99])
_SIGN = np.uint32(1 << 31)

Gather = Callable[[Any], list[Any]]
"""Gives the value of every process, in their order, on every process."""


class _Least:
    """The `num` least of the values that are added, and at most as many more. Any thread may add."""

    def __init__(self, num: int):
        # What isn't below the bound needn't be added; nor what equals it, as a gripper at rest does in most rows,
        # since so many are kept that aren't greater.
        self.num, self.bound = num, np.float32(np.inf)
        self._kept, self._num_kept, self._lock = [np.zeros(0, np.float32)], 0, threading.Lock()

    def add(self, values: NDArray[np.float32]) -> None:
        """Values that are below what `bound` is, or was."""
        with self._lock:
            self._kept.append(values)
            self._num_kept += len(values)
            if self._num_kept > 2 * self.num:
                least = np.partition(np.concatenate(self._kept), self.num - 1)[: self.num]
                self._kept, self._num_kept, self.bound = [least], self.num, least[-1]

    def keys(self) -> NDArray[np.uint32]:
        """The values in their order, as whole numbers that have it too; those of the two zeros are one."""
        bits = (np.concatenate(self._kept) + np.float32(0)).view(np.uint32)
        return np.sort(np.where(bits & _SIGN, ~bits, bits | _SIGN))


class Ends:
    """Of each of D dimensions the least and the greatest values, as many of `num_rows` rows as the quantiles q01 and
    q99 lie between: a fiftieth, and twice that while they are added. Every `stride`-th row of a block counts. Any
    thread may add."""

    def __init__(self, num_rows: int, dims: int, stride: int = 1):
        self.stride, self.count, self._lock = stride, 0, threading.Lock()
        self._most = num_rows // stride // 99 + 3
        self._least = [_Least(self._most) for _ in range(dims)]
        self._greatest = [_Least(self._most) for _ in range(dims)]  # of the values negated

    def add(self, columns: NDArray) -> None:
        """The values [D, n], none of them NaN, of n rows."""
        columns = columns[:, :: self.stride].astype(np.float32, copy=False)
        for ends, values in ((self._least, columns), (self._greatest, -columns)):
            # All dimensions by one call each: every call lets other threads run, and waits for them.
            below = values < np.array([end.bound for end in ends], np.float32)[:, None]
            chosen, stop = values[below], np.cumsum(below.sum(axis=1)).tolist()
            for end, first, last in zip(ends, [0, *stop], stop):
                if last > first:
                    end.add(chosen[first:last].copy())
        with self._lock:
            self.count += columns.shape[1]

    def quantiles(self, gather: Gather) -> NDArray[np.float64]:
        """[2, D] q01 and q99 of the values that all processes have added, as `numpy.quantile` gives them. Collective;
        the same on all."""
        count, dims = sum(gather(self.count)), len(self._least)
        place = (count - 1) * QUANTILES
        before = np.floor(place).astype(np.int64)
        wanted = np.stack([before, np.minimum(before + 1, count - 1)], axis=1)  # the values that each lies between
        wanted[1] = count - 1 - wanted[1]
        found = self._at(np.minimum(np.repeat(wanted, dims, axis=0), self._most - 1), gather).reshape(2, dims, 2)
        found[1] = -found[1]
        shares = (place - before)[:, None]
        return np.concatenate([np.quantile(ends, share, axis=1) for ends, share in zip(found, shares, strict=True)])

    def _at(self, wanted: NDArray[np.int64], gather: Gather) -> NDArray[np.float32]:
        """[2 D, K] of what all processes keep of the least values of each dimension, then of the greatest, negated,
        those that `wanted` [2 D, K] others come before: found four bits at a time, by counting what is below."""
        kept = [least.keys() for least in (*self._least, *self._greatest)]
        found = np.zeros(wanted.shape, np.uint32)
        for shift in range(28, -1, -4):
            edges = found[..., None] + (np.arange(1, 16, dtype=np.uint32) << np.uint32(shift))
            below = np.array([np.searchsorted(keys, edge) for keys, edge in zip(kept, edges, strict=True)])
            passed = (sum(gather(below)) <= wanted[..., None]).sum(-1)
            found += passed.astype(np.uint32) << np.uint32(shift)
        return np.where(found & _SIGN, found ^ _SIGN, ~found).view(np.float32)


def make_ends(num_rows: int, dims: tuple[int, int], num_actions: Sequence[int]) -> list[Ends]:
    """For a norm head's `num_rows` rows of state and actions of `dims` dimensions: of the state, and of each step of
    the actions that is counted apart, which has `num_actions` rows."""
    stride = -(-max(num_rows, sum(num_actions)) // QUANTILE_ROWS) or 1
    return [Ends(num_rows, dims[0], stride), *(Ends(num, dims[1], stride) for num in num_actions)]


def batches(heads: Sequence[Head]) -> Iterator[list[Head]]:
    """Norm heads whose ends are kept at the same time: as many as take the memory of a large one."""
    before = accumulate((head.num_rows for head in heads), initial=0)
    for _, batch in groupby(zip(heads, before), lambda pair: pair[1] // QUANTILE_ROWS):
        yield [head for head, _ in batch]
