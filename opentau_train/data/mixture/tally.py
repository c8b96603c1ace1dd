"""The statistics of rows that are counted in parts: sums, which are joined in the order of the parts, and the two ends
of the values, for exact quantiles, which don't depend on an order. So the bits don't depend on who counts a part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.mixture.ends import Ends, Gather
from opentau_train.data.mixture.normalize import HeadStats, Moments
from opentau_train.data.names import unbracketed
from opentau_train.errors import UserError

BLOCK_ROWS = 2**14
"""Rows that are added together, some megabytes."""


@dataclass(frozen=True)
class Sums:
    """Of `count` rows: their mean, their squared distances from it added up, and their extremes, all [D] float64."""

    count: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]
    min: NDArray[np.float64]
    max: NDArray[np.float64]

    @classmethod
    def of(cls, columns: NDArray) -> Sums:
        """Of the values [D, n], n > 0, of one after another n rows."""
        low, high = columns.min(1).astype(np.float64), columns.max(1).astype(np.float64)
        wide = columns.astype(np.float64)
        mean = np.clip(wide.mean(1), low, high)  # so that a constant is its mean
        wide -= mean[:, None]
        return cls(columns.shape[1], mean, np.square(wide, out=wide).sum(1), low, high)

    def joined(self, after: Sums) -> Sums:
        """Of these rows and those that come after them. Source: Chan, Golub and LeVeque, 1979."""
        count, apart = self.count + after.count, after.mean - self.mean
        low, high = np.minimum(self.min, after.min), np.maximum(self.max, after.max)
        mean = np.clip(self.mean + apart * (after.count / count), low, high)
        between = np.square(apart) * (self.count * after.count / count)
        return Sums(count, mean, self.squares + after.squares + between, low, high)


Episode = tuple[str, int, NDArray, Sequence[NDArray]]
"""(dataset name, episode number, state [L, S], actions): [L, A], then for each further step k of the chunks that start
at these rows [n, A], of the first n rows, whose chunks reach as far. One step alone: the rows themselves."""

Names = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass
class Part:
    """What some rows of a head come to: the sums of its vectors that have rows {0: state, from 1 on: steps of the
    actions}, how many episodes of each dataset they are, and which of these have values that aren't finite, with the
    first one's dataset and rows [L, D]. `missing` (dataset, episode): those whose rows aren't there."""

    sums: dict[int, Sums] = field(default_factory=dict)
    num_seen: Counter[str] = field(default_factory=Counter)
    spoiled: dict[str, list[int]] = field(default_factory=dict)
    first: tuple[str, NDArray] | None = None
    missing: list[tuple[str, int]] = field(default_factory=list)

    def add(self, block: list[Episode], ends: Sequence[Ends]) -> None:
        """Add rows, and their values to the `ends` of the head's vectors; the steps are one vector where these have no
        more."""
        self.num_seen.update(dataset for dataset, *_ in block)
        vectors = zip(*([state, *steps] for *_, state, steps in block))
        columns = (np.concatenate([rows.T for rows in of_all], axis=1) for of_all in vectors)
        state_and_actions = next(columns), next(columns)
        if not all(np.isfinite(values).all() for values in state_and_actions):
            self._add_spoiled(block)
            return
        for k, values in enumerate(chain(state_and_actions, columns)):
            place = min(k, len(ends) - 1)
            if values.shape[1]:
                ends[place].add(values)
                sums = Sums.of(values)
                self.sums[place] = self.sums[place].joined(sums) if place in self.sums else sums

    def _add_spoiled(self, block: list[Episode]) -> None:
        for dataset, episode, state, steps in block:
            values = np.concatenate([state, steps[0]], axis=1)
            if not np.isfinite(values).all():
                self.first = self.first or (dataset, values)
                self.spoiled.setdefault(dataset, []).append(episode)


def count(rows: Iterable[Episode], ends: Sequence[Ends]) -> Part:
    """What `rows` come to; their values are added to the `ends` of the head's vectors."""
    part, block, num_rows = Part(), list[Episode](), 0
    for episode in rows:
        block.append(episode)
        num_rows += len(episode[2])
        if num_rows >= BLOCK_ROWS:
            part.add(block, ends)
            block, num_rows = [], 0
    if block:
        part.add(block, ends)
    return part


def whole(
    parts: Sequence[Part], ends: Sequence[Ends], gather: Gather, names: Names, excluded: Mapping[str, Sequence[int]]
) -> HeadStats:
    """Statistics of a head from all its `parts`, in their order, and this process's `ends` of its values; `names` of
    the dimensions of state and actions. Collective.

    Raises `UserError` naming dataset, episode and dimension of the first value that is not finite, and all episodes
    with such values; a remedy that leaves them out also names those that are `excluded` {dataset: episodes} already.
    """
    _check_finite(parts, [*names[0], *names[1]], excluded)
    moments = []
    for place, end in enumerate(ends):
        of_parts = [part.sums[place] for part in parts if place in part.sums]
        if of_parts:
            s = reduce(Sums.joined, of_parts)
            quantiles = end.quantiles(gather)
            moments.append(Moments(s.count, s.mean, np.sqrt(s.squares / s.count), s.min, s.max, *quantiles))
    state, *actions = moments
    left_out = tuple(episode for part in parts for episode in part.missing)
    return HeadStats(state, _stacked(actions), *names, left_out)


def _stacked(steps: Sequence[Moments]) -> Moments:
    """[T, D] of the steps that any chunk has; [D] of one."""
    if len(steps) == 1:
        return steps[0]
    columns = [n for n in Moments.__dataclass_fields__ if n != "count"]
    return Moments(sum(s.count for s in steps), **{n: np.stack([getattr(s, n) for s in steps]) for n in columns})


def _check_finite(parts: Sequence[Part], names: Sequence[str], excluded: Mapping[str, Sequence[int]]) -> None:
    first = next((part.first for part in parts if part.first is not None), None)
    if first is None:
        return
    dataset, rows = first
    wrong = ~np.isfinite(rows)
    row, dim = np.argwhere(wrong)[0]
    episodes = [episode for part in parts for episode in part.spoiled.get(dataset, ())]
    where, remedy = f"data.sources.{dataset}", "repair the values"
    never = [unbracketed(name) for name, in_all in zip(names, wrong.all(axis=0), strict=True) if in_all]
    if len(episodes) < sum(part.num_seen[dataset] for part in parts):
        listed = ",".join(map(str, sorted({*episodes, *excluded.get(dataset, ())})))
        remedy = f"repair {'them' if len(episodes) > 1 else 'it'}, or leave out: {where}.exclude_episodes=[{listed}]"
    elif never:
        remedy = f"if it is so in all episodes, drop what has no values: {where}.drop_dims=[{','.join(never)}]"
    others = f"; so are values of {len(episodes) - 1} other episodes" if len(episodes) > 1 else ""
    raise UserError(
        f"{names[dim]} is {rows[row, dim]} in dataset '{dataset}', episode {episodes[0]}, frame {row}"
        f"{' and all others' if wrong[:, dim].all() else ''}{others}",
        where=where,
        remedy=remedy,
    )
