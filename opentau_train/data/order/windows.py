"""Samples of the tape, resolved: which window each one is, and who reads it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.order.blocks import I64

RESOLVED = ("dataset", "pass_index", "episode", "frame", "ahead")
"""The columns of `Windows` that follow from a sample's number by the plan."""


@dataclass(frozen=True)
class Windows:
    """Samples of the tape, as columns of one length: `t`, `slot` (its reader; 0 when reading in order), `dataset` i64,
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
