"""Which episodes a norm head's statistics come from: the training episodes of all datasets that share the head."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.settings import Settings
from opentau_train.data.chunk import chunks_reaching
from opentau_train.data.conventions.sources import check_agreement
from opentau_train.data.mixture import normalize
from opentau_train.data.mixture.mixture import Dataset
from opentau_train.data.mixture.normalize import HeadStats
from opentau_train.data.mixture.split import held_out_error, must_be_whole
from opentau_train.data.source import UNKNOWN_ROBOT
from opentau_train.data.transforms.pipeline import Pipeline
from opentau_train.errors import UserError
from opentau_train.types import Group

log = logging.getLogger(__name__)


def compute(settings: Settings, datasets: Sequence[Dataset], groups: Sequence[Group]) -> dict[str, HeadStats]:
    """{norm head: statistics} over all training episodes of the datasets that share the head; over the held-out ones
    where there are no others. Raises `UserError` for datasets that can't share one, and for values that aren't
    finite."""
    check_heads(datasets, groups)
    heads: dict[str, HeadStats] = {}
    for head, members in _members(datasets, groups).items():
        positions = [np.flatnonzero(_in_head(d, groups, head) & ~d.held_out & d.settings.trains) for d in members]
        if not any(map(len, positions)):  # only held-out episodes: better their statistics than none
            positions = [np.flatnonzero(_in_head(d, groups, head)) for d in members]
        held_out = [np.flatnonzero(_in_head(d, groups, head) & d.held_out) for d in members]
        if not must_be_whole(settings.validation):
            held_out = [p[:0] for p in held_out]
        heads[head] = _of_head(head, members, positions, held_out, settings)
        _check_held_out(heads[head], members, held_out)
    return heads


def _check_held_out(stats: HeadStats, members: list[Dataset], held_out: list[NDArray[np.int64]]) -> None:
    """Raises `UserError` where rows of one of the episodes `held_out` aren't there."""
    for d, positions in zip(members, held_out, strict=True):
        lacking = {number for name, number in stats.left_out if name == d.name}
        lost = [n for n in d.source.episodes.episode_index[positions].tolist() if n in lacking]
        if lost:
            raise held_out_error(d.name, "rows", lost, [*d.settings.exclude_episodes, *lacking])


def _of_head(
    head: str,
    members: list[Dataset],
    positions: list[NDArray[np.int64]],
    held_out: list[NDArray[np.int64]],
    settings: Settings,
) -> HeadStats:
    """Statistics over the episodes at `positions` of each member, or what an earlier run stored of the same ones. What
    is `left_out` is looked for among the episodes at `held_out`, too."""
    first, per_timestep = members[0], settings.data.normalization_per_timestep
    by_chunks = per_timestep or any(Pipeline(d.transforms).per_chunk for d in members)
    identity = []
    for d, p, looked_at in zip(members, positions, held_out, strict=True):
        names = d.state_names + d.action_names
        identity += [d.name, d.source.fingerprint, d.source.rows_stamp, repr(names), repr(p.tolist())]
        identity.append(repr(looked_at.tolist()))
        if d.transforms:
            identity.append(json.dumps(Pipeline(d.transforms).to_json()))
        if by_chunks:
            identity.append(json.dumps([d.chunk_offsets.tolist(), per_timestep]))
            if d.between is not None and (d.chunk_offsets % 1).any():
                identity.append(repr(d.between))

    left_out: list[tuple[str, int]] = []

    def rows() -> normalize.Rows:
        for d, chosen in zip(members, positions, strict=True):
            missing, numbers = set(chosen.tolist()), d.source.episodes.episode_index
            for place, state, steps in d.chunks(chosen) if by_chunks else _rows(d, chosen):
                missing.discard(place)
                yield d.name, int(numbers[place]), state, steps
            left_out.extend((d.name, int(numbers[place])) for place in sorted(missing))
        if len(left_out) == sum(map(len, positions)):
            where = f"data.sources.{first.name}"
            remedy = "restore the dataset's files of rows (download or export it again)"
            raise UserError(f"no episode of norm head {head} has rows that can be read", where=where, remedy=remedy)
        for d, chosen, looked_at in zip(members, positions, held_out, strict=True):
            rest = np.setdiff1d(looked_at, chosen)
            there = {place for place, _, _ in d.source.columns(rest)}
            numbers = d.source.episodes.episode_index
            left_out.extend((d.name, int(numbers[place])) for place in rest.tolist() if place not in there)

    def make() -> HeadStats:
        excluded = {d.name: d.settings.exclude_episodes for d in members}
        stats = normalize.compute(rows(), num_rows, first.state_names, first.action_names, excluded, chunks)
        return replace(stats, left_out=tuple(left_out))

    lengths = [d.source.episodes.length[p] for d, p in zip(members, positions, strict=True)]
    num_rows, chunks = sum(int(length.sum()) for length in lengths), None
    if by_chunks:
        steps = (chunks_reaching(n[:, None], d.chunk_offsets) for d, n in zip(members, lengths, strict=True))
        chunks = normalize.Chunks(sum(int(n.sum()) for n in steps), per_timestep)
    return normalize.cached(settings.paths.cache, identity, make)


def _rows(dataset: Dataset, positions: NDArray[np.int64]) -> Iterator[tuple[int, NDArray, list[NDArray]]]:
    for place, state, actions in dataset.columns(positions):
        yield place, state, [actions]


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
