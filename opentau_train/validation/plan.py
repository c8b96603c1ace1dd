"""Which windows a validation reads, and how the ranks share them. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.modes import MODES
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.blocks import DatasetBlocks
from opentau_train.data.order.windows import Windows, frames_ahead


def validation_windows(
    blocks: list[DatasetBlocks], group_of: list[NDArray[np.int64]], max_per_group: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(dataset, episode position, frame) [N] of every window to validate, in reading order.

    `group_of` gives each dataset's group per episode position. With `max_per_group` a group keeps a systematic
    sample: windows floor(i * n / m) of its n in order, so the same ones whatever the ranks.
    """
    columns = []
    for d, block in enumerate(blocks):
        order = np.lexsort((block.start, block.number))
        length = block.length[order].astype(np.int64)
        first = np.cumsum(length) - length
        frame = block.frames(np.repeat(order, length), np.arange(length.sum()) - np.repeat(first, length))
        columns.append(np.stack([np.full(len(frame), d), np.repeat(block.episode[order], length), frame]))
    dataset, episode, frame = np.concatenate(columns, axis=1) if columns else np.zeros((3, 0), np.int64)
    if max_per_group is None or not len(dataset):
        return dataset, episode, frame
    group = np.concatenate([group_of[d][columns[d][1]] for d in range(len(blocks))])
    keep = np.zeros(len(dataset), bool)
    for g in np.unique(group):
        members = np.flatnonzero(group == g)
        num = min(max_per_group, len(members))
        keep[members[np.arange(num) * len(members) // num]] = True
    return dataset[keep], episode[keep], frame[keep]


def equal_spans(cost: NDArray[np.float64], parts: int) -> NDArray[np.int64]:
    """[parts + 1] bounds of contiguous spans of about equal total `cost` [N] (each span within one item of its
    share)."""
    ends = np.cumsum(cost)
    total = ends[-1] if len(ends) else 0.0
    inner = np.searchsorted(ends - cost / 2, total * np.arange(1, parts) / parts)
    return np.concatenate([[0], inner, [len(cost)]]).astype(np.int64)


MAX_DECODE_GAP = 32
"""Frames: a larger gap inside an episode costs a seek, about this many frames' decoding at the usual GOP, and so does
the first window of an episode."""


FRAME_COST = 1 / 32
"""The cost of decoding one frame, relative to all else that a window costs: measured in benchmarks/validation_pass.py,
where an episode's opening takes less than another window does. A larger value would balance the decoders of ranks whose
forwards are then far from even."""


@dataclass(frozen=True)
class ValidationPlan:
    """What a pass reads, the same on every rank.

    `windows`: N windows in reading order, `t` being the place in the list; what is read `ahead` is known only for each
    worker (`for_worker`). A window of several modes comes once for each. `item` [N] i64: each window's episode and
    mode, as a row of the sums; `group_of` [E] i64: the rows' groups; `episode_of` [E] i64 numbers the rows' episodes;
    `episodes`: their (dataset name, episode number); `bounds` [R+1] i64: the ranks' contiguous spans.
    """

    mixture: Mixture
    windows: Windows
    item: NDArray[np.int64]
    group_of: NDArray[np.int64]
    episode_of: NDArray[np.int64]
    episodes: tuple[tuple[str, int], ...]
    bounds: NDArray[np.int64]
    batch_size: int

    @property
    def num_windows(self) -> NDArray[np.int64]:
        """[E] i64: how many windows each row of the sums has."""
        return np.bincount(self.item, minlength=len(self.group_of))

    def place(self, t: int) -> str:
        """Where window number `t` is, as text."""
        item = int(self.item[t])
        tag = self.mixture.groups[int(self.group_of[item])].tag
        return f"{tag} episode {self.episodes[item][1]} frame {int(self.windows.frame[t])}"

    @property
    def num_batches(self) -> int:
        """How many batches the busiest rank reads."""
        return max(self.num_batches_of(rank) for rank in range(len(self.bounds) - 1))

    def num_batches_of(self, rank: int) -> int:
        return -int(-(self.bounds[rank + 1] - self.bounds[rank]) // self.batch_size)

    def for_worker(self, rank: int, worker: int, num_workers: int) -> Iterator[Windows]:
        """The batches of a worker: a contiguous run of its rank's, so that it decodes each frame once."""
        low, high = self.bounds[rank : rank + 2]
        starts = np.array_split(np.arange(low, high, self.batch_size), num_workers)[worker]
        if not len(starts):
            return
        run = self.windows.select(slice(starts[0], min(starts[-1] + self.batch_size, high)))
        run = dataclasses.replace(run, ahead=frames_ahead(run.dataset, run.episode, run.frame))
        for start in starts - starts[0]:
            yield run.select(slice(start, start + self.batch_size))


def plan_validation(
    mixture: Mixture,
    max_samples_per_group: int | None,
    *,
    batch_size: int,
    num_ranks: int,
    modes: Sequence[str] = MODES,
) -> ValidationPlan:
    """List the held-out windows, each in all of `modes` that its dataset has, and cut the list into spans of equal
    decode cost."""
    datasets = mixture.datasets
    dataset, episode, frame = validation_windows(
        [d.validation for d in datasets], [d.group_of for d in datasets], max_samples_per_group
    )
    first = np.ones(len(dataset), bool)
    first[1:] = (dataset[1:] != dataset[:-1]) | (episode[1:] != episode[:-1])
    gap = np.where(first, MAX_DECODE_GAP, np.minimum(np.diff(frame, prepend=0), MAX_DECODE_GAP))
    chosen = [[place for place, mode in enumerate(d.settings.modes) if mode in modes] for d in datasets]
    pairs = [(window, place) for window, d in enumerate(dataset.tolist()) for place in chosen[d]]
    again, mode = np.array(pairs, np.int64).reshape(-1, 2).T  # [N] which window, which of its dataset's modes
    cost = 1.0 + FRAME_COST * np.where(np.diff(again, prepend=-1) > 0, gap[again], 0)
    dataset, episode, frame, number = (column[again] for column in (dataset, episode, frame, np.cumsum(first)))
    _, rows, item = np.unique(number * len(MODES) + mode, return_index=True, return_inverse=True)
    of_rows = [(datasets[d], e, m) for d, e, m in zip(dataset[rows], episode[rows], mode[rows], strict=True)]
    group_of = np.array([d.group_of[e] + m for d, e, m in of_rows], np.int64)
    episodes = tuple((d.name, int(d.source.episodes.episode_index[e])) for d, e, _ in of_rows)
    zeros = np.zeros(len(again), np.int64)
    windows = Windows(np.arange(len(again)), zeros, dataset, zeros, episode, frame, ahead=zeros, mode=mode)
    bounds = equal_spans(cost, num_ranks)
    return ValidationPlan(mixture, windows, item, group_of, number[rows], episodes, bounds, batch_size)
