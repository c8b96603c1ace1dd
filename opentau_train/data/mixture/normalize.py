"""Normalisation statistics of a norm head (robot_type::control_mode), from its training episodes' columns.

    normalised = (x - offset) * scale,   x = normalised / scale + offset

A dimension that doesn't vary has scale 0: it is zero after normalisation and its constant after the inverse, never
divided by a tiny number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.transforms.normalize import Affine, Normalize, Vector

Method = Literal["mean_std", "min_max", "quantiles"]
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
