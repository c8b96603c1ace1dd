"""Which datasets share a norm head, and which of their episodes its statistics are of: the training episodes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.settings import Settings
from opentau_train.data.conventions.sources import check_agreement
from opentau_train.data.mixture.mixture import Dataset
from opentau_train.data.mixture.normalize import HeadStats
from opentau_train.data.mixture.split import must_be_whole
from opentau_train.data.source import UNKNOWN_ROBOT
from opentau_train.data.transforms.pipeline import Pipeline
from opentau_train.errors import UserError
from opentau_train.types import Group

log = logging.getLogger(__name__)


class Member(NamedTuple):
    """A dataset of a norm head. [E] which of its episodes are `counted`, and which are `looked_at`, to see whether
    their rows are there."""

    dataset: Dataset
    counted: NDArray[np.bool_]
    looked_at: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Head:
    """A norm head. `by_chunks`: its statistics are of the actions of all chunks; `per_timestep`: each step's apart."""

    name: str
    members: list[Member]
    by_chunks: bool
    per_timestep: bool

    @property
    def num_rows(self) -> int:
        return sum(int(d.source.episodes.length[counted].sum(dtype=np.int64)) for d, counted, _ in self.members)


def heads_of(settings: Settings, datasets: Sequence[Dataset], groups: Sequence[Group]) -> list[Head]:
    """The norm heads of a mixture, of all training episodes of their datasets; of the held-out ones where there are no
    others."""
    heads, whole = [], must_be_whole(settings.validation)
    per_timestep = settings.data.normalization_per_timestep
    for name, members in _members(datasets, groups).items():
        own = [_in_head(d, groups, name) for d in members]
        counted = [of & ~d.held_out & d.settings.trains for of, d in zip(own, members, strict=True)]
        if not np.concatenate(counted).any():  # only held-out episodes: better their statistics than none
            counted = own
        looked_at = [of & d.held_out & whole for of, d in zip(own, members, strict=True)]
        by_chunks = per_timestep or any(Pipeline(d.transforms).per_chunk for d in members)
        heads.append(Head(name, list(map(Member, members, counted, looked_at)), by_chunks, per_timestep))
    return heads


def _members(datasets: Sequence[Dataset], groups: Sequence[Group]) -> dict[str, list[Dataset]]:
    """{norm head: the datasets that have it}, by name."""
    return {
        head: [d for d in datasets if any(groups[g].norm_head == head for g in np.unique(d.group_of))]
        for head in sorted({g.norm_head for g in groups})
    }


def check_heads(datasets: Sequence[Dataset], groups: Sequence[Group]) -> None:
    """Raises `UserError` for datasets that can't share a norm head, as far as metadata show it."""
    for head, members in _members(datasets, groups).items():
        for other in members[1:]:
            _check_shared(head, members[0], other)
        for one, other in combinations(members, 2):
            check_agreement(head, one.conversions, other.conversions, (_rate(one), _rate(other)))


def _rate(dataset: Dataset) -> float:
    return dataset.settings.fps or dataset.source.fps


def _check_shared(head: str, one: Dataset, other: Dataset) -> None:
    """Statistics over both mean something only where each dimension is the same quantity of the same robot. Raises
    `UserError` where they can't be, or nobody says that they are; warns where only the names differ."""
    names, other_names = (d.state_names + d.action_names for d in (one, other))
    apart = f"set data.sources.{other.name}.robot_type or control_mode to tell them apart"
    both = f"datasets '{one.name}' and '{other.name}'"
    if len(names) != len(other_names) or len(one.action_names) != len(other.action_names):
        raise UserError(
            f"{both} share norm head {head} but not dimensions", where=f"data.sources.{other.name}", remedy=apart
        )
    differs = next((f"'{a}' and '{b}'" for a, b in zip(names, other_names, strict=True) if a != b), None)
    if differs is None:
        return
    if one.source.robot_type == UNKNOWN_ROBOT:
        raise UserError(
            f"{both} say no robot type, and their dimensions have different names: {differs}",
            where=f"data.sources.{other.name}",
            remedy="set robot_type of both: the same one pools their statistics, different ones keep them apart",
        )
    log.warning("%s share norm head %s, though dimensions are named %s: %s", both, head, differs, apart)


def _in_head(dataset: Dataset, groups: Sequence[Group], head: str) -> NDArray[np.bool_]:
    return np.array([group.norm_head == head for group in groups], bool)[dataset.group_of]


def check(stats: dict[str, HeadStats], datasets: Sequence[Dataset], groups: Sequence[Group]) -> None:
    """Raises `UserError` for a norm head of the mixture that `stats` don't know, or know with other dimensions."""
    for dataset in datasets:
        for g in np.unique(dataset.group_of):
            head = groups[g].norm_head
            known = stats.get(head)
            if known is None or len(known.action_names) != len(dataset.action_names):
                raise UserError(
                    f"the checkpoint has no statistics for norm head {head} "
                    f"with {len(dataset.action_names)} action dimensions",
                    where=f"data.sources.{dataset.name}",
                    remedy=f"it knows: {', '.join(sorted(stats))}; set robot_type and control_mode to one of these",
                )
