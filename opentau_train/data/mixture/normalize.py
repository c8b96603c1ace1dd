"""Normalisation statistics of a norm head (robot_type::control_mode), from its training episodes' columns.

    normalised = (x - offset) * scale,   x = normalised / scale + offset

A dimension that doesn't vary has scale 0: it is zero after normalisation and its constant after the inverse, never
divided by a tiny number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.names import unbracketed
from opentau_train.data.transforms.normalize import Affine, Normalize, Vector
from opentau_train.errors import UserError, check_machine

log = logging.getLogger(__name__)

Method = Literal["mean_std", "min_max", "quantiles"]
VERSION = 1
QUANTILE_ROWS = 2_000_000
"""Rows kept for the quantiles: every k-th one with the smallest k that fits, all of them on smaller data."""
_CONSTANT = 1e-6


@dataclass(frozen=True)
class Moments:
    """Statistics of one vector's dimensions, all [D] float64, or [T, D] for each step of the chunk; `count` rows."""

    count: int
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    min: NDArray[np.float64]
    max: NDArray[np.float64]
    q01: NDArray[np.float64]
    q99: NDArray[np.float64]

    def to_json(self) -> dict:
        return {
            n: v.tolist() if isinstance(v := getattr(self, n), np.ndarray) else v for n in self.__dataclass_fields__
        }

    @classmethod
    def from_json(cls, tree: dict) -> Moments:
        columns = {n: np.array(v, np.float64) for n, v in tree.items() if n != "count"}
        return cls(count=int(tree["count"]), **columns)


def affine_of(moments: Moments, method: Method) -> Affine:
    """The map that normalises by `moments`: to zero mean and unit deviation with mean_std, to [-1, 1] between the two
    bounds with min_max and quantiles (q01, q99; the extremes where these two are one)."""
    if method == "mean_std":
        offset, spread = moments.mean, moments.std
    else:
        rare = np.ones(moments.min.shape, bool) if method == "min_max" else rarely_moving(moments)
        low, high = np.where(rare, moments.min, moments.q01), np.where(rare, moments.max, moments.q99)
        offset, spread = (low + high) / 2, (high - low) / 2
    varies = _varies(offset, spread)
    scale = np.where(varies, 1.0 / np.where(varies, spread, 1.0), 0.0)
    return Affine(offset.astype(np.float32), scale.astype(np.float32))


def rarely_moving(moments: Moments) -> NDArray[np.bool_]:
    """[D] or [T, D] the dimensions that vary, but in fewer rows than the quantiles q01 and q99 see."""
    flat = ~_varies((moments.q01 + moments.q99) / 2, (moments.q99 - moments.q01) / 2)
    return flat & _varies((moments.min + moments.max) / 2, (moments.max - moments.min) / 2)


def _varies(offset: NDArray[np.float64], spread: NDArray[np.float64]) -> NDArray[np.bool_]:
    return spread > _CONSTANT * np.maximum(1.0, np.abs(offset))


@dataclass(frozen=True)
class HeadStats:
    """One norm head's statistics and dimension names of state and actions. `left_out`: the episodes (dataset, number)
    that should have been part of them and whose rows can't be had."""

    state: Moments
    actions: Moments
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    left_out: tuple[tuple[str, int], ...] = ()

    def to_json(self) -> dict:
        return ({"left_out": self.left_out} if self.left_out else {}) | {
            "state": self.state.to_json(),
            "actions": self.actions.to_json(),
            "state_names": list(self.state_names),
            "action_names": list(self.action_names),
        }

    @classmethod
    def from_json(cls, tree: dict) -> HeadStats:
        names = tuple(tree["state_names"]), tuple(tree["action_names"])
        left_out = tuple((dataset, number) for dataset, number in tree.get("left_out", ()))
        return cls(Moments.from_json(tree["state"]), Moments.from_json(tree["actions"]), *names, left_out)


Rows = Iterator[tuple[str, int, NDArray, Sequence[NDArray]]]
"""(dataset name, episode number, state [L, S], actions): [L, A], then for each further step k of the chunks that start
at these rows [n, A], of the first n rows, whose chunks reach as far. One step alone: the rows themselves."""


@dataclass(frozen=True)
class Chunks:
    """That actions are counted by chunks: `num_rows` in all of them, not padded; `per_timestep`: each step apart."""

    num_rows: int
    per_timestep: bool


def compute(
    rows: Rows,
    num_rows: int,
    state_names: Sequence[str],
    action_names: Sequence[str],
    excluded: Mapping[str, Sequence[int]] = MappingProxyType({}),
    chunks: Chunks | None = None,
) -> HeadStats:
    """Statistics of a head over `rows`. Raises `UserError` naming dataset, episode and dimension of the first value
    that is not finite, and all episodes with such values; a remedy that leaves them out also names those that are
    `excluded` {dataset: episodes} already."""
    chunks = chunks or Chunks(num_rows, per_timestep=False)
    state, actions = _Accumulator(num_rows, len(state_names)), list[_Accumulator]()
    spoiled: dict[str, list[int]] = {}
    num_seen = Counter[str]()
    first: tuple[str, NDArray] | None = None
    for dataset, episode, state_rows, steps in rows:
        values = np.concatenate([state_rows, steps[0]], axis=1)
        num_seen[dataset] += 1
        if not np.isfinite(values).all():
            first = first or (dataset, values)
            spoiled.setdefault(dataset, []).append(episode)
        elif first is None:
            state.add(state_rows)
            for k, action_rows in enumerate(steps):
                step = k if chunks.per_timestep else 0
                if step == len(actions):
                    actions.append(_Accumulator(chunks.num_rows, len(action_names)))
                if len(action_rows):
                    actions[step].add(action_rows)
    if first is not None:
        dataset, values = first
        without = {*spoiled[dataset], *excluded.get(dataset, ())} if len(spoiled[dataset]) < num_seen[dataset] else None
        raise _not_finite(values, [*state_names, *action_names], dataset, spoiled[dataset], without)
    each = [step.moments() for step in actions if step.count]
    return HeadStats(state.moments(), _stacked(each), tuple(state_names), tuple(action_names))


def _stacked(steps: Sequence[Moments]) -> Moments:
    """[T, D] of the steps that any chunk has; [D] of one."""
    if len(steps) == 1:
        return steps[0]
    columns = [n for n in Moments.__dataclass_fields__ if n != "count"]
    return Moments(sum(s.count for s in steps), **{n: np.stack([getattr(s, n) for s in steps]) for n in columns})


def _not_finite(
    rows: NDArray, names: Sequence[str], dataset: str, episodes: Sequence[int], without: Collection[int] | None
) -> UserError:
    """The error of the `episodes` of a dataset with values that aren't finite; `rows` [L, D] are the first one's.
    `without`: the episodes to leave out, None where none would be left."""
    wrong = ~np.isfinite(rows)
    row, dim = np.argwhere(wrong)[0]
    where, remedy = f"data.sources.{dataset}", "repair the values"
    never = [unbracketed(name) for name, in_all in zip(names, wrong.all(axis=0), strict=True) if in_all]
    if without is not None:
        listed = ",".join(map(str, sorted(without)))
        remedy = f"repair {'them' if len(episodes) > 1 else 'it'}, or leave out: {where}.exclude_episodes=[{listed}]"
    elif never:
        remedy = f"if it is so in all episodes, drop what has no values: {where}.drop_dims=[{','.join(never)}]"
    others = f"; so are values of {len(episodes) - 1} other episodes" if len(episodes) > 1 else ""
    return UserError(
        f"{names[dim]} is {rows[row, dim]} in dataset '{dataset}', episode {episodes[0]}, frame {row}"
        f"{' and all others' if wrong[:, dim].all() else ''}{others}",
        where=where,
        remedy=remedy,
    )


class _Accumulator:
    """Sums of rows shifted by the first one (so that float64 loses nothing to a large mean), extremes, a sample."""

    def __init__(self, num_rows: int, dims: int):
        self.stride = -(-num_rows // QUANTILE_ROWS) or 1
        self.count = 0
        self.shift: NDArray | None = None
        self.sum, self.square = np.zeros(dims), np.zeros(dims)
        self.min, self.max = np.full(dims, np.inf), np.full(dims, -np.inf)
        self.kept: list[NDArray] = []

    def add(self, rows: NDArray) -> None:
        rows = rows.astype(np.float64)
        if self.shift is None:
            self.shift = rows[0]
        shifted = rows - self.shift
        self.sum += shifted.sum(0)
        self.square += np.square(shifted).sum(0)
        self.min, self.max = np.minimum(self.min, rows.min(0)), np.maximum(self.max, rows.max(0))
        self.kept.append(rows[(-self.count) % self.stride :: self.stride].astype(np.float32))
        self.count += len(rows)

    def moments(self) -> Moments:
        dims = len(self.min)
        if self.shift is None:
            raise ValueError("statistics of no rows")
        mean = self.sum / self.count
        variance = np.maximum(self.square / self.count - np.square(mean), 0.0)
        low, high = np.quantile(np.concatenate(self.kept), [0.01, 0.99], axis=0) if dims else (np.zeros(0),) * 2
        return Moments(
            count=self.count,
            mean=np.clip(mean + self.shift, self.min, self.max),
            std=np.sqrt(variance),
            min=self.min,
            max=self.max,
            q01=low.astype(np.float64),
            q99=high.astype(np.float64),
        )


def cached(cache: Path, key_parts: Sequence[str], make) -> HeadStats:
    """`make()`, or what an earlier run stored in `cache` under the same `key_parts`. Raises `UserError` where it can't
    be stored."""
    digest = hashlib.blake2b(json.dumps([VERSION, *key_parts]).encode(), digest_size=16).hexdigest()
    path = cache / "stats" / f"{digest}.json"
    if path.is_file():
        try:
            return HeadStats.from_json(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s can't be read and is computed again: %s", path, error)
    stats = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fresh = Path(folder) / path.name
            with open(fresh, "w") as file:
                json.dump(stats.to_json(), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
    except OSError as error:
        check_machine(error, path.parent)
        remedy = "set paths.cache_dir to a directory that you can write"
        raise UserError(f"the statistics can't be stored: {error}", where=str(path.parent), remedy=remedy) from error
    return stats


def normalizer(stats: Mapping[str, HeadStats], method: Method) -> Normalize:
    """The transform that normalises by the statistics of each norm head."""

    def vectors(moments: Moments) -> tuple[Vector, Vector]:
        affine = affine_of(moments, method)
        return _tuples(affine.offset), _tuples(affine.scale)

    return Normalize({h: {"state": vectors(s.state), "actions": vectors(s.actions)} for h, s in stats.items()})


def _tuples(values: NDArray[np.float32]) -> Vector:
    return tuple(map(tuple, values.tolist())) if values.ndim == 2 else tuple(values.tolist())


def constant_dimensions(stats: HeadStats, method: Method) -> list[str]:
    """Names of the dimensions that normalisation leaves at zero."""
    return _named(stats, lambda moments: affine_of(moments, method).scale == 0)


def rare_dimensions(stats: HeadStats, method: Method) -> list[str]:
    """Names of the dimensions that are normalised by their extremes, quantiles being asked for."""
    return _named(stats, rarely_moving) if method == "quantiles" else []


def _named(stats: HeadStats, chosen: Callable[[Moments], NDArray[np.bool_]]) -> list[str]:
    pairs = ((stats.state, stats.state_names), (stats.actions, stats.action_names))
    masks = ((np.all(np.atleast_2d(chosen(m)), axis=0), names) for m, names in pairs)
    return [n for mask, names in masks for n, is_chosen in zip(names, mask.tolist(), strict=True) if is_chosen]
