"""Where lanes begin and whose turn it is: version 3 of the order. Pure: integers in, integers out.

A *group* is a run of windows whose frames a decoder gives in one go: it begins where a group of pictures does. A lane
that begins inside one decodes all that lies before it there in vain, so lanes begin where groups do. They can't all
be equally long then, and take turns by length: a stretch is halved again and again down to its lanes, and of n turns of
a part of s windows the first half, of a windows, has ceil(n a / s), as Bresenham draws a line. docs/data.md shows what
follows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.order.blocks import I64, DatasetBlocks

CONSECUTIVE = 4
"""Windows that one lane may give to a batch: a longer group is cut, and decoded more than once for it."""
LEAST_STRETCHES = 8
"""Up to so many ranks have lanes of their own, whatever the data."""
MOST_LOST = 0.05
"""Of the windows of a phase, how many frames the ends of its stretches may cost."""


def num_stretches(batch_size: int, phase_size: float, lost: float) -> int:
    """The stretches that a phase of `phase_size` windows is cut into, where a cut at any place costs `lost` frames: the
    most that divide the batch and together cost no more than `MOST_LOST`."""
    most = max(min(LEAST_STRETCHES, batch_size), MOST_LOST * phase_size / lost if lost else batch_size)
    return max(n for n in range(1, batch_size + 1) if batch_size % n == 0 and n <= most)


def cost_of_a_cut(blocks: DatasetBlocks) -> float:
    """Frames that are decoded in vain where a lane begins at a place drawn at random: half a group of mean size, each
    counted by its windows."""
    if blocks.groups is None or not blocks.num_windows:
        return 0.0
    size = np.diff(blocks.groups, append=blocks.num_windows).astype(np.float64)
    return float((size * (size - 1)).sum() / 2 / blocks.num_windows * blocks.stride)


def snapped(groups: NDArray[np.uint32] | I64, num_windows: int, place: I64, most: int) -> I64:
    """[N] the places nearest to `place` [N] at which a group begins or ends. One of more than `most` windows counts as
    several, evenly cut."""
    at = np.searchsorted(groups, place, side="right") - 1
    begins = groups[at].astype(np.int64)
    after = groups[np.minimum(at + 1, len(groups) - 1)].astype(np.int64)
    size = np.where(at + 1 < len(groups), after, num_windows) - begins
    parts = -(-size // most)
    part = ((place - begins) * parts * 2 + size) // (2 * size)
    return begins + part * size // parts


class PhaseLanes:
    """The lanes of a phase: lane i of stretch k holds its places `cuts[k, i]` to `cuts[k, i + 1]` - 1, one after
    another; some are empty. `first` and `after` [K, L] say of each lane which is the first one of its dataset in the
    stretch, and which comes after the last."""

    def __init__(self, cuts: I64, ends: I64):
        """`cuts` [K, L + 1] rising; `ends` [D] the places at which the datasets' shares end, among the cuts."""
        self.cuts = cuts
        dataset = np.searchsorted(ends, cuts[:, :-1], side="right")
        lane = np.arange(dataset.shape[1])
        changes = np.diff(dataset, axis=1, prepend=-1) != 0
        self.first = np.maximum.accumulate(np.where(changes, lane, 0), axis=1)
        ending = np.append(changes[:, 1:], np.ones((len(cuts), 1), np.bool_), axis=1)
        backwards = np.where(ending, lane + 1, len(lane) + 1)[:, ::-1]
        self.after = np.minimum.accumulate(backwards, axis=1)[:, ::-1]

    def turns(self, stretch: I64, turn: I64) -> tuple[I64, I64, I64]:
        """(lane, place, windows that the lane has left then) [N] of turn number `turn` [N] of the stretches `stretch`
        [N]. Datasets are parted first, so that each has its share of any turns; then lanes, halved."""
        low, high = np.zeros_like(turn), np.full_like(turn, self.cuts.shape[1] - 1)
        while (several := high - low > 1).any():
            middle = (low + high) // 2
            first, after = self.first[stretch, middle], self.after[stretch, middle]
            middle = np.where(first > low, first, np.where(after < high, after, middle))
            begins, size = self.cuts[stretch, low], self.cuts[stretch, high] - self.cuts[stretch, low]
            part = self.cuts[stretch, middle] - begins
            size = np.maximum(size, 1)
            had = -(-turn * part // size)
            its = -(-(turn + 1) * part // size) > had
            low, high, turn = (
                np.where(several & ~its, middle, low),
                np.where(several & its, middle, high),
                np.where(several, np.where(its, had, turn - had), turn),
            )
        place = self.cuts[stretch, low] + turn
        return low, place, self.cuts[stretch, low + 1] - 1 - place


def phase_cuts(starts: I64, lanes: int, ends: I64, snap: Callable[[I64], I64]) -> I64:
    """[K, L + 1] the cuts of a phase whose stretches begin at `starts` [K + 1], each in `lanes` lanes, and more where
    a dataset's share ends (`ends` [D]) inside one; `snap` moves the places [N] of even cuts."""
    length = np.diff(starts)
    inner = starts[:-1, None] + np.arange(1, lanes) * length[:, None] // lanes
    inner = snap(inner.ravel()).reshape(inner.shape)
    inner = np.clip(inner, starts[:-1, None], starts[1:, None])
    stretch = np.searchsorted(starts, ends[:-1], side="right") - 1
    inside = (ends[:-1] > starts[stretch]) if len(stretch) else np.zeros(0, bool)
    stretch, borders = stretch[inside], ends[:-1][inside]
    order = np.arange(len(stretch)) - np.searchsorted(stretch, stretch)
    width = int(order.max(initial=-1)) + 1
    extra = np.repeat(starts[1:, None], width, axis=1)
    extra[stretch, order] = borders
    return np.sort(np.concatenate([starts[:-1, None], inner, extra, starts[1:, None]], axis=1), axis=1)
