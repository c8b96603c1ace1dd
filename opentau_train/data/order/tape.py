"""The lane tape: the stream's whole order as a pure function of a global sample number.

    t  ->  (dataset, pass, block, window)

Nothing but `t` moves. An epoch draws `n_d` windows from dataset d, the next ones of the dataset's *line*: its blocks
ordered by a keyed hash, pass after pass, laid end to end. An epoch is cut into *phases*, each with its exact share of
every dataset. A phase is cut into B even *stretches* of windows, one for each sample of a batch, and a stretch into v
*lanes*, which are read in parallel: sample u of a phase is row `u div V` of slot `c = u mod V` (V = v * B), and slot c
reads lane `c div B` of stretch `c mod B` (those one window longer come first). So B consecutive samples come from the B
stretches, one of each, every lane is sequential inside an episode, and no rank or worker appears in the formula.
docs/data.md derives it; docs/architecture.md shows where it is used.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opentau_train import rng
from opentau_train.data.order.blocks import I64, DatasetBlocks
from opentau_train.errors import UserError

VERSION = 2
RESOLVED = ("dataset", "pass_index", "episode", "frame", "ahead")
"""The columns of `Windows` that follow from a sample's number by the plan."""


@dataclass(frozen=True)
class Windows:
    """Samples of the tape, as columns of one length: `t`, `slot` (t mod V; 0 when reading in order), `dataset` i64,
    `pass_index` i64, `episode` (position in the dataset's table), `frame` i64; `ahead` i64, how many of the frames that
    follow the slot is going to read next, one by one; `mode` i64, which of the dataset's modes (None: it is drawn)."""

    t: I64
    slot: I64
    dataset: I64
    pass_index: I64
    episode: I64
    frame: I64
    ahead: I64
    mode: I64 | None = None

    def __len__(self) -> int:
        return len(self.t)

    def digest(self) -> int:
        """A 64-bit hash of the ordered addresses."""
        rows = np.stack([self.dataset, self.pass_index, self.episode, self.frame], axis=1)
        return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=8).digest(), "little")

    def select(self, keep: NDArray | slice) -> Windows:
        """Only the windows at the places (or under the mask) `keep`."""
        return Windows(**{name: column[keep] for name, column in vars(self).items() if column is not None})


def frames_ahead(dataset: I64, episode: I64, frame: I64) -> I64:
    """[N] i64: for windows that one reader takes in this order, how many follow each frame by frame (those that come
    several times, once for each mode, count once)."""
    step = np.diff(frame)
    goes_on = (np.diff(dataset) == 0) & (np.diff(episode) == 0) & ((step == 1) | (step == 0))
    ends = np.append(np.flatnonzero(~goes_on), len(frame) - 1)
    return frame[ends[np.searchsorted(ends, np.arange(len(frame)))]] - frame


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
        epoch, within = t // self.epoch_size, t % self.epoch_size
        phase = self._phase_of(within)
        counted = epoch * self.num_phases + phase
        for number in np.unique(counted).tolist():
            e, p = divmod(number, self.num_phases)
            here = np.flatnonzero(counted == number)
            place, left = self._place_in_phase(p, within[here] - self._phase_start(p))
            for name, column in self._windows_at(place, left, epoch=e, phase=p).items():
                columns[name][here] = column
        # In order there is one lane: another reader for each slot would decode every frame again and again.
        slot = np.zeros_like(t) if self.in_order else t % self.num_lanes
        return Windows(t=t, slot=slot, **columns)

    def first_sample(self, step: int) -> int:
        """The number t of the first sample of optimizer step `step` (the first one is 0)."""
        return step * self.batch_size + self.offset

    def batch(self, step: int) -> Windows:
        """The global batch of optimizer step `step`, in its order."""
        return self.windows(np.arange(self.first_sample(step), self.first_sample(step + 1)))

    def owned(self, steps: range, rank: int, size: int, worker: int, num_workers: int) -> list[Windows]:
        """What one worker of one rank builds of the batches of consecutive `steps`: for each step its windows.

        Slot j belongs to rank `j mod R` and to its worker `(j div R) mod W`; R must divide B.
        """
        assert self.batch_size % size == 0, (self.batch_size, size)
        t = np.arange(self.first_sample(steps.start), self.first_sample(steps.stop))
        slot = t % self.num_lanes
        windows = self.windows(t[(slot % size == rank) & ((slot // size) % num_workers == worker)])
        ends = np.searchsorted(windows.t, [self.first_sample(step + 1) for step in steps])
        return [windows.select(slice(low, high)) for low, high in zip([0, *ends[:-1]], ends)]

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

    def _place_in_phase(self, phase: int, u: I64) -> tuple[I64, I64]:
        """Window of the phase that sample u of it reads (slot, lane, row), and how many its lane has left then."""
        length = int(self._phase_start(phase + 1) - self._phase_start(phase))
        if self.in_order:
            return u, length - 1 - u
        num_stretches = self.batch_size
        # Cut evenly, so that their lengths differ by one at most and each begins within a window of its share.
        start = np.arange(num_stretches + 1) * length // num_stretches
        stretch_of = np.argsort(-np.diff(start), kind="stable")  # the first slots have the longer ones
        row, slot = np.divmod(u, self.num_lanes)
        lane, column = np.divmod(slot, num_stretches)
        # The last, partial row is a prefix of the slots: their lanes are one window longer.
        rows, longer = divmod(length, self.num_lanes)
        longer_lanes, longer_columns = divmod(longer, num_stretches)
        before = lane * rows + np.minimum(lane, longer_lanes + (column < longer_columns))
        return start[stretch_of[column]] + before + row, rows + (slot < longer) - 1 - row

    def _windows_at(self, place: I64, left: I64, *, epoch: int, phase: int) -> dict[str, I64]:
        """The columns `RESOLVED` [N] of the windows at the places `place` [N] of a phase, which holds its share of one
        dataset after another; `left` [N] is how many windows each one's lane has to read after it.

        For instance an epoch draws 6 windows of dataset a and 2 of b, in two phases, so that places 0 to 2 of a phase
        are a's and place 3 is b's. Place 1 of phase 1 in epoch 2 is entry 2 * 6 + 3 + 1 = 16 of a's line: if a has 5
        windows, it is window 1 of pass 3, as 16 = 3 * 5 + 1.
        """
        low = phase * self.draws // self.num_phases
        share = (phase + 1) * self.draws // self.num_phases - low
        ends = np.cumsum(share)
        dataset = np.searchsorted(ends, place, side="right")
        line = epoch * self.draws[dataset] + low[dataset] + place - (ends - share)[dataset]
        columns = {name: np.zeros(len(place), np.int64) for name in RESOLVED}
        columns["dataset"][:] = dataset
        left = np.minimum(left, ends[dataset] - 1 - place)  # a lane that goes on in another dataset has another reader
        for d in np.unique(dataset).tolist():
            of_dataset = np.flatnonzero(dataset == d)
            pass_index, offset = np.divmod(line[of_dataset], self.sizes[d])
            columns["pass_index"][of_dataset] = pass_index
            for k in np.unique(pass_index).tolist():
                in_pass = pass_index == k
                chosen = of_dataset[in_pass]
                episode, frame, ahead_in_block = self._block_window(d, k, offset[in_pass])
                columns["episode"][chosen], columns["frame"][chosen] = episode, frame
                columns["ahead"][chosen] = np.minimum(left[chosen], ahead_in_block)
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
