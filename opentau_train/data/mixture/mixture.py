"""The mixture: named sources in their places, split, grouped and normalised. `open` makes one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.data import DataSettings, SourceSettings
from opentau_train.data.mixture.normalize import Affine, HeadStats
from opentau_train.data.order.blocks import DatasetBlocks
from opentau_train.data.order.tape import Tape
from opentau_train.data.source import Source
from opentau_train.types import BatchSpec, Group


@dataclass(frozen=True)
class Dataset:
    """A source in its place: its settings, its split and its blocks of either side.

    `repo_id` is the deduplicated mixture-level name; `group_of` [E] i64 the group of each episode of its table.
    """

    index: int
    name: str
    repo_id: str
    settings: SourceSettings
    source: Source
    chunk_length: int
    held_out: NDArray[np.bool_]
    train: DatasetBlocks
    validation: DatasetBlocks
    group_of: NDArray[np.int64]


@dataclass(frozen=True)
class Mixture:
    """All datasets, in the order of the configuration's names sorted, so that permuting a config changes nothing.

    `draws` n_d windows an epoch; `groups` (dataset, control_mode); `affine` {norm head: (state, actions)}.
    """

    settings: DataSettings
    seed: int
    datasets: tuple[Dataset, ...]
    draws: tuple[int, ...]
    groups: tuple[Group, ...]
    stats: dict[str, HeadStats]
    affine: dict[str, tuple[Affine, Affine]]
    spec: BatchSpec

    def tape(self, batch_size: int) -> Tape:
        """The plan of the training stream for a global batch of `batch_size` samples."""
        return Tape(
            [d.train for d in self.datasets],
            list(self.draws),
            seed=self.seed,
            batch_size=batch_size,
            lanes_per_sample=self.settings.lanes_per_sample,
            phase_rows=self.settings.phase_rows,
        )
