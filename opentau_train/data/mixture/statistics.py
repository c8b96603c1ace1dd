"""The statistics of a mixture's norm heads, from the rows of their episodes, which are counted in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.settings import Settings
from opentau_train.data.chunk import chunks_reaching
from opentau_train.data.mixture import stored
from opentau_train.data.mixture.ends import Ends, batches, make_ends
from opentau_train.data.mixture.heads import Head, Member, check_heads, heads_of
from opentau_train.data.mixture.mixture import Dataset
from opentau_train.data.mixture.normalize import HeadStats
from opentau_train.data.mixture.split import held_out_error
from opentau_train.data.mixture.tally import Episode, Part, count, whole
from opentau_train.data.mixture.team import Team, parts
from opentau_train.errors import UserError
from opentau_train.types import Group


def compute(
    settings: Settings, datasets: Sequence[Dataset], groups: Sequence[Group], team: Team
) -> dict[str, HeadStats]:
    """{norm head: statistics} over the episodes of `heads_of`, or what an earlier run stored of the same ones; the same
    to the bit whatever the `team`. Collective. Raises `UserError` for datasets that can't share a head, rows that can't
    be read, and values that aren't finite."""
    check_heads(datasets, groups)
    heads, cache = heads_of(settings, datasets, groups), settings.paths.cache
    found = team.gather(stored.read(cache, heads) if team.rank == 0 else {})[0]
    for batch in batches([head for head in heads if head.name not in found]):
        fresh = dict(zip(batch, _count(batch, team), strict=True))
        found |= {head.name: stats for head, stats in fresh.items()}
        team.agree(partial(stored.write, cache, fresh if team.rank == 0 else {}))
    for head in heads:
        _check_held_out(found[head.name], head.members)
    return {head.name: found[head.name] for head in heads}


def _check_held_out(stats: HeadStats, members: Sequence[Member]) -> None:
    """Raises `UserError` where rows of one of the held-out episodes that are looked at aren't there."""
    for d, _, looked_at in members:
        lacking = {number for name, number in stats.left_out if name == d.name}
        lost = [n for n in d.source.episodes.episode_index[looked_at].tolist() if n in lacking]
        if lost:
            raise held_out_error(d.name, "rows", lost, [*d.settings.exclude_episodes, *lacking])


def _count(heads: Sequence[Head], team: Team) -> list[HeadStats]:
    """The statistics of each head. Raises `UserError` on all processes alike."""
    ends = {head: _ends(head) for head in heads}
    runs = [(head, member, part) for head in heads for member in head.members for part in _parts(member)]
    num_rows = [int(d.source.episodes.length[part].sum(dtype=np.int64)) for _, (d, *_), part in runs]
    counted = team.each(lambda run, tell: _count_part(*run, ends[run[0]], tell), runs, num_rows)
    stats = []
    for head in heads:
        found = [part for (of, *_), part in zip(runs, counted, strict=True) if of is head]
        first = head.members[0].dataset
        if not any(part.num_seen for part in found):
            where = f"data.sources.{first.name}"
            remedy = "restore the dataset's files of rows (download or export it again)"
            what = f"no episode of norm head {head.name} has rows that can be read"
            raise UserError(what, where=where, remedy=remedy)
        excluded = {member.dataset.name: member.dataset.settings.exclude_episodes for member in head.members}
        names = first.state_names, first.action_names
        stats.append(whole(found, ends[head], team.gather, names, excluded))
    return stats


def _parts(member: Member) -> list[NDArray[np.int64]]:
    return parts(member.dataset.source, np.flatnonzero(member.counted | member.looked_at))


def _ends(head: Head) -> list[Ends]:
    """Of the state, then of the actions: all in one, or by their step of the chunk."""
    num_actions = [head.num_rows]
    if head.by_chunks:
        pairs = ((d.source.episodes.length[counted], d.chunk_offsets) for d, counted, _ in head.members)
        reaching = (chunks_reaching(length[:, None], offsets).sum(axis=0).tolist() for length, offsets in pairs)
        steps = list(map(sum, zip_longest(*reaching, fillvalue=0)))
        num_actions = steps if head.per_timestep else [sum(steps)]
    first = head.members[0].dataset
    return make_ends(head.num_rows, (len(first.state_names), len(first.action_names)), num_actions)


def _count_part(
    head: Head, member: Member, positions: NDArray[np.int64], ends: list[Ends], tell: Callable[[int], None]
) -> Part:
    """What the rows of the counted episodes among `positions` come to. `tell` hears of rows read."""
    d, missing, numbers = member.dataset, set(positions.tolist()), member.dataset.source.episodes.episode_index

    def rows() -> Iterator[Episode]:
        for place, state, steps in d.chunks(positions) if head.by_chunks else _rows(d, positions):
            missing.discard(place)
            tell(len(state))
            if member.counted[place]:
                yield d.name, int(numbers[place]), state, steps

    part = count(rows(), ends)
    part.missing = [(d.name, number) for number in numbers[sorted(missing)].tolist()]
    return part


def _rows(dataset: Dataset, positions: NDArray[np.int64]) -> Iterator[tuple[int, NDArray, list[NDArray]]]:
    for place, state, actions in dataset.columns(positions):
        yield place, state, [actions]
