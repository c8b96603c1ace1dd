"""The lane tape: the stream's whole order as a pure function of a global sample number.

    t  ->  (dataset, pass, block, window)

Nothing but `t` moves. An epoch draws `n_d` windows from dataset d, the next ones of the dataset's *line*: its blocks
ordered by a keyed hash, pass after pass, laid end to end. An epoch is cut into *phases*, each with its exact share of
every dataset. A phase is cut into K even *stretches* of windows, where K divides the batch B, and a stretch into
v B / K *lanes*, which begin where a decoder can (`lanes.py`) and are read in parallel: sample u of a phase is turn
`u div K` of stretch `u mod K` (those one window longer come first). So B consecutive samples come from the K stretches
alike, every lane is sequential inside an episode, and no rank or worker appears in the formula. docs/data.md derives
it; docs/architecture.md shows where it is used.

Version 2, whose runs are resumed as they began, knows no keyframes: K = B, and sample u is row `u div V` of slot
`c = u mod V` (V = v B), which reads lane `c div B` of stretch `c mod B`; lanes of a stretch differ by a window at most.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from opentau_train import rng
from opentau_train.data.order.blocks import I64, DatasetBlocks
from opentau_train.data.order.lanes import CONSECUTIVE, PhaseLanes, cost_of_a_cut, num_stretches, phase_cuts, snapped
from opentau_train.data.order.windows import RESOLVED, Windows
from opentau_train.errors import UserError

VERSION = 3
VERSIONS = (2, VERSION)
"""Those that can be read: a run keeps the one it began with."""


class Tape:
    """The plan of a mixture. Holds the orders of the passes it was last asked for, nothing else.

    `batch_size` B is the global batch, `lanes_per_sample` v, `phase_rows` about how many rows a phase has, `draws`
    n_d. Step s takes the B samples from `first_sample(s)` on: s * B, unless `offset` moves them (a run that was resumed
    on changed data). Raises `UserError` for a dataset without windows, unless others have some and none are drawn from
    it.
    """

    def __init__(
        self,
        datasets: list[DatasetBlocks],
        draws: list[int],
        *,
        seed: int,
        batch_size: int,
        lanes_per_sample: int = 4,
        phase_rows: int = 1024,
        offset: int = 0,
        version: int = VERSION,
    ):
        for blocks, drawn in zip(datasets, draws, strict=True):
            if blocks.num_windows == 0 and (drawn or not sum(draws)):
                raise UserError(
                    f"dataset '{blocks.name}' has no training window left",
                    where=f"data.sources.{blocks.name}",
                    remedy="loosen its filters, chunk_length, drop_tail or val_split_ratio, or remove it",
                )
        self.datasets = datasets
        self.seed = seed
        self.batch_size = batch_size
        self.lanes_per_sample = lanes_per_sample
        self.num_lanes = lanes_per_sample * batch_size
        self.phase_rows = phase_rows
        self.offset = offset
        self.draws = np.array(draws, np.int64)
        self.sizes = np.array([b.num_windows for b in datasets], np.int64)
        self.epoch_size = int(self.draws.sum())
        self.num_phases = max(1, round(self.epoch_size / (self.num_lanes * phase_rows)))
        # Reading in order is asked for when no dataset is shuffled: lanes would shuffle what the user wants in order.
        self.in_order = not any(b.shuffle for b in datasets)
        self._passes: dict[tuple[int, int], tuple[NDArray[np.int32], I64]] = {}
        self.version = version
        self.num_stretches = batch_size
        if version > 2:
            lost = np.array([cost_of_a_cut(b) for b in datasets]) @ self.draws / self.epoch_size
            self.num_stretches = num_stretches(batch_size, self.epoch_size / self.num_phases, float(lost))
        self._lanes: dict[tuple[int, int], PhaseLanes] = {}

    def moved(self, offset: int) -> Tape:
        """The same plan, whose step s takes the samples from s * B + `offset` on."""
        other = copy.copy(self)
        other.offset = offset
        return other

    # -- the plan ------------------------------------------------------------------------------------------------

    def windows(self, t: I64) -> Windows:
        """The windows of the global sample numbers `t` [N] i64, in their order."""
        t = np.asarray(t, np.int64)
        columns = {name: np.zeros(len(t), np.int64) for name in RESOLVED}
        lane = np.zeros(len(t), np.int64)
        epoch, within = t // self.epoch_size, t % self.epoch_size
        phase = self._phase_of(within)
        counted = epoch * self.num_phases + phase
        for number in np.unique(counted).tolist():
            e, p = divmod(number, self.num_phases)
            here = np.flatnonzero(counted == number)
            lane[here], place, left = self._place_in_phase(e, p, within[here] - self._phase_start(p))
            for name, column in self._windows_at(place, left, epoch=e, phase=p).items():
                columns[name][here] = column
        return Windows(t=t, slot=self._slot(t, lane), **columns)

    def _slot(self, t: I64, lane: I64) -> I64:
        """[N] the readers of the samples `t` [N], each of the lane `lane` [N] of its stretch: the same ones in each
        phase, and each on one rank if the ranks divide the stretches."""
        if self.in_order:  # one lane: another reader for each slot would decode every frame again and again
            return np.zeros_like(t)
        if self.version == 2:
            return t % self.num_lanes
        return t % self.num_stretches * self._lanes_at_most + lane

    @property
    def _lanes_at_most(self) -> int:
        """Lanes of a stretch, with those that the ends of datasets add."""
        return self.num_lanes // self.num_stretches + len(self.datasets) - 1

    def first_sample(self, step: int) -> int:
        """The number t of the first sample of optimizer step `step` (the first one is 0)."""
        return step * self.batch_size + self.offset

    def batch(self, step: int) -> Windows:
        """The global batch of optimizer step `step`, in its order."""
        return self.windows(np.arange(self.first_sample(step), self.first_sample(step + 1)))

    def owned(self, steps: range, rank: int, size: int, worker: int, num_workers: int) -> list[Windows]:
        """What one worker of one rank builds of the batches of consecutive `steps`: for each step its windows.

        Sample t belongs to rank `t mod R`, where R must divide B, and there to the worker that has its lane.
        """
        assert self.batch_size % size == 0, (self.batch_size, size)
        t = np.arange(self.first_sample(steps.start), self.first_sample(steps.stop))
        if self.version == 2 or self.in_order:
            slot = t % self.num_lanes
            windows = self.windows(t[(slot % size == rank) & ((slot // size) % num_workers == worker)])
        else:
            windows = self.windows(t[t % size == rank])
            column, lane = np.divmod(windows.slot, self._lanes_at_most)
            # Neighbours take turns with distant lanes of their stretch: whole ranges share it at each step.
            lanes = self.num_lanes // self.num_stretches
            part = np.minimum(lane, lanes - 1) * num_workers // lanes
            windows = windows.select((part + column // size) % num_workers == worker)
        ends = np.searchsorted(windows.t, [self.first_sample(step + 1) for step in steps])
        return [windows.select(slice(low, high)) for low, high in zip([0, *ends[:-1]], ends)]

    def lane_begins(self, phase: int = 0) -> Iterator[tuple[int, I64]]:
        """(dataset, the windows at which lanes begin in this phase of the first epoch, counted through its blocks as
        they stand in the table), of each pass over each dataset."""
        lanes = self._phase_lanes(0, phase, self._stretches(phase))
        begins = lanes.cuts[:, :-1][np.diff(lanes.cuts) > 0]
        for d, k, _, offset in self._on_lines(begins, 0, *self._shares(phase)):
            yield d, self._table_place(d, k, offset)

    def epoch_of(self, t: int) -> float:
        """How many epochs lie before sample t."""
        return t / self.epoch_size

    # -- phases and lanes ----------------------------------------------------------------------------------------

    def _phase_start(self, phase: int | I64) -> int | I64:
        """First sample of a phase inside its epoch: sum over datasets of floor(phase * n_d / P)."""
        return (np.asarray(phase)[..., None] * self.draws // self.num_phases).sum(-1)

    def _phase_of(self, within: I64) -> I64:
        """The phase that holds each sample: its start is at most P * D windows off the even cut, so a step or two."""
        phase = np.minimum(within * self.num_phases // self.epoch_size, self.num_phases - 1)
        while (ahead := within >= self._phase_start(phase + 1)).any():
            phase = phase + ahead
        while (behind := within < self._phase_start(phase)).any():
            phase = phase - behind
        return phase

    def _place_in_phase(self, epoch: int, phase: int, u: I64) -> tuple[I64, I64, I64]:
        """Of sample u of the phase the lane of its stretch, its window of the phase, and how many windows the lane has
        left then."""
        length = int(self._phase_start(phase + 1) - self._phase_start(phase))
        if self.in_order:
            return np.zeros_like(u), u, length - 1 - u
        start = self._stretches(phase)
        stretch_of = np.argsort(-np.diff(start), kind="stable")  # the first slots have the longer ones
        if self.version > 2:
            turn, column = np.divmod(u, self.num_stretches)
            return self._phase_lanes(epoch, phase, start).turns(stretch_of[column], turn)
        row, slot = np.divmod(u, self.num_lanes)
        lane, column = np.divmod(slot, self.num_stretches)
        # The last, partial row is a prefix of the slots: their lanes are one window longer.
        rows, longer = divmod(length, self.num_lanes)
        longer_lanes, longer_columns = divmod(longer, self.num_stretches)
        before = lane * rows + np.minimum(lane, longer_lanes + (column < longer_columns))
        return lane, start[stretch_of[column]] + before + row, rows + (slot < longer) - 1 - row

    def _stretches(self, phase: int) -> I64:
        """[K + 1] the places of a phase at which its stretches begin and end: cut evenly, so that their lengths differ
        by one at most and each begins within a window of its share."""
        length = int(self._phase_start(phase + 1) - self._phase_start(phase))
        return np.arange(self.num_stretches + 1) * length // self.num_stretches

    def _phase_lanes(self, epoch: int, phase: int, start: I64) -> PhaseLanes:
        """The lanes of a phase whose stretches begin at `start`. The last few are kept."""
        cached = self._lanes.get((epoch, phase))
        if cached is None:
            low, share = self._shares(phase)
            ends = np.cumsum(share)
            most = max(1, CONSECUTIVE * int(ends[-1]) // self.batch_size)

            def snap(place: I64) -> I64:
                moved = place.copy()
                for d, k, chosen, offset in self._on_lines(place, epoch, low, share):
                    groups = self.datasets[d].groups
                    if groups is not None:
                        table = self._table_place(d, k, offset)
                        to = snapped(groups, int(self.sizes[d]), table, most)
                        moved[chosen] = np.clip(place[chosen] + to - table, ends[d] - share[d], ends[d])
                return moved

            lanes = self.num_lanes // self.num_stretches
            cached = PhaseLanes(phase_cuts(start, lanes, ends, snap), ends)
            for stale in sorted(self._lanes)[:-2]:
                del self._lanes[stale]
            self._lanes[epoch, phase] = cached
        return cached

    def _shares(self, phase: int) -> tuple[I64, I64]:
        """([D] each dataset's draws of an epoch before the phase, [D] those in it)."""
        low = phase * self.draws // self.num_phases
        return low, (phase + 1) * self.draws // self.num_phases - low

    def _on_lines(self, place: I64, epoch: int, low: I64, share: I64) -> Iterator[tuple[int, int, I64, I64]]:
        """(dataset d, pass k, which of the places `place` [N] of a phase are in it, their offsets in pass k) for each
        pass that they touch; the phase has `share` [D] of the datasets, and `low` [D] lie before it in the epoch.

        For instance an epoch draws 6 windows of dataset a and 2 of b, in two phases, so that places 0 to 2 of a phase
        are a's and place 3 is b's. Place 1 of phase 1 in epoch 2 is entry 2 * 6 + 3 + 1 = 16 of a's line: if a has 5
        windows, it is window 1 of pass 3, as 16 = 3 * 5 + 1.
        """
        ends = np.cumsum(share)
        dataset = np.searchsorted(ends, place, side="right")
        for d in np.unique(dataset).tolist():
            of_dataset = np.flatnonzero(dataset == d)
            line = epoch * self.draws[d] + low[d] + place[of_dataset] - (ends - share)[d]
            passes, offset = np.divmod(line, self.sizes[d])
            for k in np.unique(passes).tolist():
                yield d, k, of_dataset[passes == k], offset[passes == k]

    def _windows_at(self, place: I64, left: I64, *, epoch: int, phase: int) -> dict[str, I64]:
        """The columns `RESOLVED` [N] of the windows at the places `place` [N] of a phase, which holds its share of one
        dataset after another; `left` [N] is how many windows each one's lane has to read after it."""
        low, share = self._shares(phase)
        ends = np.cumsum(share)
        columns = {name: np.zeros(len(place), np.int64) for name in RESOLVED}
        for d, k, chosen, offset in self._on_lines(place, epoch, low, share):
            columns["dataset"][chosen], columns["pass_index"][chosen] = d, k
            episode, frame, ahead_in_block = self._block_window(d, k, offset)
            columns["episode"][chosen], columns["frame"][chosen] = episode, frame
            # A lane that goes on in another dataset has another reader.
            of_lane = np.minimum(left[chosen], ends[d] - 1 - place[chosen])
            columns["ahead"][chosen] = np.minimum(of_lane, ahead_in_block)
        return columns

    def _block_window(self, d: int, k: int, offset: I64) -> tuple[I64, I64, I64]:
        """(episode, frame, frames of the block that follow one by one) of the windows at `offset` of pass k of d."""
        order, ends = self._pass(d, k)
        blocks = self.datasets[d]
        place = np.searchsorted(ends, offset, side="right")
        block = order[place]
        inside = offset - (ends[place] - blocks.length[block])
        ahead = ends[place] - 1 - offset if blocks.stride == 1 else np.zeros_like(offset)
        return blocks.episode[block].astype(np.int64), blocks.frames(block, inside), ahead

    def _table_place(self, d: int, k: int, offset: I64) -> I64:
        """The windows at `offset` of pass k of d, counted through its blocks in the table's order."""
        order, ends = self._pass(d, k)
        place = np.searchsorted(ends, offset, side="right")
        block = order[place]
        return self.datasets[d].ends[block] - (ends[place] - offset)

    def _pass(self, d: int, k: int) -> tuple[NDArray[np.int32], I64]:
        """Order of the blocks in pass k of dataset d and their cumulative ends. The last few are kept."""
        cached = self._passes.get((d, k))
        if cached is None:
            blocks = self.datasets[d]
            if blocks.shuffle:
                keys = rng.fold(rng.key(self.seed, "order", blocks.name, k), blocks.number, blocks.start)
                order = np.argsort(keys, kind="stable").astype(np.int32)
            else:
                order = np.arange(len(blocks.length), dtype=np.int32)
            made = order, np.cumsum(blocks.length[order], dtype=np.int64)
            for stale in [key for key in self._passes if key[0] == d and key[1] < k - 1]:
                del self._passes[stale]
            self._passes[d, k] = made
            return made
        return cached
