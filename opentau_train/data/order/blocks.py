"""Which windows there are: blocks of consecutive windows of one episode. Pure: arrays in, arrays out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from opentau_train.types import EpisodeTable


def make_blocks(
    name: str,
    table: EpisodeTable,
    source_blocks: NDArray[np.int32],
    keep: NDArray[np.bool_],
    *,
    rows: int,
    drop_tail: bool,
    shuffle: bool,
    stride: int = 1,
    made_of: Mapping[str, str] | None = None,
) -> DatasetBlocks:
    """The source's blocks of the episodes under `keep` [E], cut to windows that may start; `source_blocks` [N, 3] int32
    (position in the table, first frame, length). `made_of`: see `DatasetBlocks`.

    With `drop_tail` a window's chunk, which reaches over `rows` rows, must lie inside its episode, so the last
    `rows - 1` frames start none. With `stride` k only every k-th frame of a block starts one, its first being one.
    """
    episode, start, length = (source_blocks[:, i].astype(np.int32) for i in range(3))
    if drop_tail:
        last = table.length[episode] - rows + 1
        length = np.minimum(length, last - start)
    length = -(-length // stride)
    chosen = keep[episode] & (length > 0)
    return DatasetBlocks(
        name=name,
        episode=episode[chosen],
        start=start[chosen],
        length=length[chosen].astype(np.int32),
        number=table.episode_index[episode[chosen]],
        shuffle=shuffle,
        stride=stride,
        made_of=made_of or {},
    )


I64 = NDArray[np.int64]


@dataclass(frozen=True)
class DatasetBlocks:
    """The blocks of one dataset: `episode` [N] i32 position in its table, `start` [N] i32 first frame, `length` [N]
    i32 windows, `stride` frames apart, `number` [N] i64 the episode's number in the dataset (the name its hash key
    uses); lengths are above 0 and (number, start) occurs once. `made_of` {"files" or "filter": a hash} identifies what
    the blocks were made from, so that a resume can say what has changed.

    `groups` [K] rising, from 0 on, u32 where that is wide enough, else i64: the windows, counted through the blocks as
    they stand here, at which a lane can begin without decoding frames in vain; each block's first is one. None: at all,
    as far as is known. `lead` [N] i32: the frames that are decoded before each block's first."""

    name: str
    episode: NDArray[np.int32]
    start: NDArray[np.int32]
    length: NDArray[np.int32]
    number: I64
    shuffle: bool = True
    stride: int = 1
    made_of: Mapping[str, str] = field(default_factory=dict)
    groups: NDArray[np.uint32] | I64 | None = None
    lead: NDArray[np.int32] | None = None

    @cached_property
    def ends(self) -> I64:
        """[N] how many windows the blocks up to and with each one have."""
        return np.cumsum(self.length, dtype=np.int64)

    @property
    def num_windows(self) -> int:
        return int(self.length.sum(dtype=np.int64))

    def without(self, numbers: Sequence[int]) -> DatasetBlocks:
        """The blocks of all episodes but those of these numbers."""
        keep = ~np.isin(self.number, numbers)
        columns = {name: getattr(self, name)[keep] for name in ("episode", "start", "length", "number")}
        if self.groups is not None and self.lead is not None:
            block = np.searchsorted(self.ends, self.groups, side="right")
            removed = np.cumsum(np.where(keep, 0, self.length), dtype=np.int64)
            columns |= {"groups": (self.groups - removed[block])[keep[block]], "lead": self.lead[keep]}
        return replace(self, **columns)

    def entered_at(self, ends: I64, frame: NDArray[np.int32], reach: int) -> DatasetBlocks:
        """The blocks with the groups of windows that follow from the keyframes of their videos: `frame` [K], those of
        the episode at position e, one at least, ending at `ends[e]`; a window reaches back over `reach` frames."""
        num = np.diff(ends, prepend=0)
        keys = (np.repeat(np.arange(len(ends), dtype=np.int64), num) << 32) + frame + reach
        begins = (self.episode.astype(np.int64) << 32) + self.start
        low = np.searchsorted(keys, begins, side="right")
        inside = np.searchsorted(keys, begins + (self.length.astype(np.int64) - 1) * self.stride, side="right") - low
        block = np.repeat(np.arange(len(begins)), inside)
        key = keys[np.arange(len(block)) + np.repeat(low - np.cumsum(inside) + inside, inside)]
        first = self.ends - self.length
        groups = np.unique(np.concatenate([first, first[block] - (begins[block] - key) // self.stride]))
        if self.num_windows < 2**32:
            groups = groups.astype(np.uint32)
        before = self.start - frame[np.maximum(low - 1, (ends - num)[self.episode])]
        return replace(self, groups=groups, lead=np.maximum(before, 0).astype(np.int32))

    def digest(self) -> str:
        """A hash of the block table: what a checkpoint compares before it trusts its sample number."""
        return self._hash(self.number, self.start, self.length)

    @property
    def groups_digest(self) -> str:
        """The same of its groups; nothing where there are none."""
        return "" if self.groups is None else self._hash(self.groups)

    def _hash(self, *columns: NDArray) -> str:
        state = hashlib.blake2b(f"{self.name}:{self.shuffle}:{self.stride}".encode(), digest_size=8)
        for column in columns:
            state.update(np.ascontiguousarray(column, np.int64).tobytes())
        return state.hexdigest()

    def frames(self, block: NDArray | int, inside: NDArray | int) -> I64:
        """The frames at which the windows `inside` (counted from 0) of the blocks at the places `block` start."""
        return self.start[block].astype(np.int64) + np.asarray(inside, np.int64) * self.stride

    def window(self, place: int) -> tuple[int, int]:
        """(episode, frame) of window number `place` of the dataset, counted through the blocks in table order."""
        block = int(np.searchsorted(self.ends, place, side="right"))
        return int(self.episode[block]), int(self.frames(block, place - self.ends[block] + self.length[block]))


def draws_per_epoch(sizes: list[int], weights: list[float | None]) -> list[int]:
    """Windows an epoch draws from each dataset.

    No weight above 0 set: every window once. Else the epoch keeps the mixture's size and is shared by weight (a null
    weight counts as the dataset's own share of the windows), by largest remainder, at least one a dataset that has any.
    """
    if not any(weights):
        return list(sizes)
    total = sum(sizes)
    shares = np.array([size / total if w is None else w for size, w in zip(sizes, weights, strict=True)])
    exact = shares / shares.sum() * total
    draws = np.maximum(np.floor(exact).astype(np.int64), np.minimum(sizes, 1))  # none of a validation-only dataset
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    for place in order[: max(0, total - int(draws.sum()))]:
        draws[place] += 1
    return draws.tolist()
