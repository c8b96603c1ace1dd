"""Finders of what the actions are to the state, and of how the dimensions move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.lint.finding import UNKNOWN, Finding, by_value
from opentau_train.data.lint.sample import F64, EpisodeSample

ABSOLUTE, DELTA = "absolute", "delta_step"
_SPAN_S = 0.3
"""Way that is compared: shorter ones drown in the sensors' noise, longer ones are few."""
_LAGS_S = (-0.2, 0.6)
_LEAST_R2 = 0.8
_CLEARER = 0.5
"""The better explanation leaves at most this share of what the other one leaves unexplained."""


@dataclass(frozen=True)
class Following:
    """How the state follows the actions, of each pair of dimensions [P]: `r2` [P] of the better explanation, whether
    that is the actions' change or their sum (`kind`), by how many frames the state comes after it (`lag`, NaN where no
    lag is clearly best), the state's way per way of the actions (`slope`), and the other explanation's `r2_other`."""

    kind: list[str]
    r2: F64
    r2_other: F64
    lag: F64
    slope: F64


def following(sample: EpisodeSample) -> Following:
    """Compares the state's way over some frames with the change of the actions over as many (they are absolute), and
    with their sum (they are differences), at every lag."""
    span, lags = sample.frames(_SPAN_S), lags_of(sample)
    pairs = sample.pairs
    sums = np.zeros((2, len(lags), 3, len(pairs)))  # of x x, y y and x y
    turns = [turns_of(episodes)[pairs[:, i]] for i, episodes in enumerate((sample.state, sample.actions))]
    for state, actions in zip(sample.state, sample.actions, strict=True):
        way = ways(unwrapped(state[:, pairs[:, 0]], turns[0]), span)
        own = unwrapped(actions[:, pairs[:, 1]], turns[1])
        for kind, series in enumerate((own, np.cumsum(own, axis=0) - own)):
            sums[kind] += _products(ways(series, span), way, lags)
    xx, yy, xy = np.moveaxis(sums, 2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r2, slope = np.nan_to_num(xy * xy / (xx * yy)), np.nan_to_num(xy / xx)  # [2, K, P]
    best = r2.max(axis=1)
    winner, p = best.argmax(axis=0), np.arange(len(pairs))
    at = r2.argmax(axis=1)[winner, p]
    known = (best.max(0) >= _LEAST_R2) & (1 - best.max(0) < _CLEARER * (1 - best.min(0)))
    around = np.maximum(r2[winner, np.maximum(at - 2, 0), p], r2[winner, np.minimum(at + 2, len(lags) - 1), p])
    peaked = known & (1 - best.max(0) < 0.9 * (1 - around)) & (at > 0) & (at < len(lags) - 1)
    return Following(
        kind=[(ABSOLUTE, DELTA)[w] if k else UNKNOWN for w, k in zip(winner, known, strict=True)],
        r2=best.max(axis=0),
        r2_other=best.min(axis=0),
        lag=np.where(peaked, lags[at] + winner, np.nan),
        slope=slope[winner, at, p],
    )


def lags_of(sample: EpisodeSample) -> NDArray[np.int64]:
    """The lags in frames, of the state behind the actions, that are compared."""
    return np.arange(min(-2, round(_LAGS_S[0] * sample.fps)), max(5, round(_LAGS_S[1] * sample.fps)) + 1)


def agreement(sample: EpisodeSample, paths: Sequence[F64], steps: Sequence[F64]) -> float:
    """r2, at the best lag, of the ways of the `paths` [L, 3] as one multiple of the sums of the `steps` [L, 3]; 0
    where they go against them."""
    span, lags = sample.frames(_SPAN_S), lags_of(sample)
    sums = np.zeros((len(lags), 3, 3))
    for path, step in zip(paths, steps, strict=True):
        sums += _products(ways(np.cumsum(step, axis=0) - step, span), ways(path, span), lags)
    xx, yy, xy = np.moveaxis(sums.sum(axis=2), 1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.nan_to_num(np.maximum(xy, 0) ** 2 / (xx * yy)).max())


def _products(x: F64, y: F64, lags: NDArray[np.int64]) -> F64:
    """[K, 3, P] the sums of x x, y y and x y at each lag of y [L, P] behind x [L, P]."""
    sums = np.zeros((len(lags), 3, x.shape[1]))
    for k, lag in enumerate(lags.tolist()):
        num = max(len(y) - abs(lag), 0)
        u, v = x[max(-lag, 0) :][:num], y[max(lag, 0) :][:num]
        sums[k] = [np.einsum("ij,ij->j", one, other) for one, other in ((u, u), (v, v), (u, v))]
    return sums


def references(sample: EpisodeSample, follow: Following, pairs: Sequence[int]) -> list[Finding]:
    """Whether actions are `absolute` (the state a few frames later) or a `delta_step` (what the state moves by), by
    dimension, of the `pairs` chosen."""
    dims = tuple(sample.action_names[sample.pairs[p, 1]] for p in pairs)
    kinds, r2, other, slope = (
        [list(column)[p] for p in pairs] for column in (follow.kind, follow.r2, follow.r2_other, follow.slope)
    )
    evidence = [
        f"r2 {r:.3f}, otherwise {o:.3f}" + (f"; the state goes {s:.3g} for each" if kind == DELTA else "")
        for kind, r, o, s in zip(kinds, r2, other, slope, strict=True)
    ]
    return by_value("reference", dims, kinds, evidence)


def lags(sample: EpisodeSample, follow: Following) -> list[Finding]:
    """Frames from an action to the state that it brings about: 1 is the next row's, 0 its own row's."""
    dims = tuple(sample.action_names[a] for a in sample.pairs[:, 1])
    values = [UNKNOWN if np.isnan(lag) else f"{lag:.0f}" for lag in follow.lag]
    evidence = [f"r2 {r:.3f} there" for r in follow.r2]
    return by_value("lag", dims, values, evidence)


def clipped(names: tuple[str, ...], episodes: Sequence[F64]) -> Finding:
    """The dimensions that run into a limit: they arrive at their extreme moving, and stand there exactly; three times,
    or twice where several dimensions do."""
    rows = np.concatenate(episodes)
    share, extremes = np.zeros(len(names)), (rows.min(axis=0), rows.max(axis=0))
    arrivals = np.array([sum(_arrivals(x, x == extreme) for x in episodes) for extreme in extremes])
    least = _LEAST_ARRIVALS - (arrivals[arrivals >= _LEAST_ARRIVALS - 1].sum() >= 2 * _LEAST_ARRIVALS)
    for extreme, often in zip(extremes, arrivals >= least, strict=True):
        share += np.where(often, (rows == extreme).mean(axis=0), 0.0)
    which = [i for i in np.flatnonzero(share >= _LEAST_SHARE) if len(np.unique(rows[:, i])) >= _LEAST_VALUES]
    evidence = f"up to {share.max():.1%} of the rows at an extreme that is entered in full motion"
    return Finding("limits", tuple(names[i] for i in which), "clipped" if which else "free", evidence)


_IDLE_SHARE, _IDLE_S = 0.2, 2.0
_LEAST_ARRIVALS, _LEAST_VALUES, _LEAST_SHARE = 3, 20, 0.01


def _arrivals(x: F64, at: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[D] the runs of three frames and more of x [L, D] `at` an extreme whose first step was no smaller than a third of
    the one before: what comes to rest by itself slows down."""
    starts = at[2:-2] & ~at[1:-3] & at[3:-1] & at[4:]
    step = np.abs(np.diff(x, axis=0))
    return (starts & (step[1:-2] >= 0.3 * step[:-3])).sum(axis=0)


def idle(sample: EpisodeSample, follow: Following) -> Finding:
    """Whether episodes rest long: how many frames lie in half a second, and in the longest stretch of such, in which no
    dimension of the actions goes 1 % of its range."""
    span = sample.frames(0.5)
    delta = np.zeros(len(sample.action_names), bool)
    delta[sample.pairs[:, 1]] = [kind == DELTA for kind in follow.kind]
    turns = turns_of(sample.actions)
    paths = [np.where(delta, np.cumsum(a, axis=0), unwrapped(a, turns)) for a in sample.actions]
    low, high = np.percentile(np.concatenate(paths), [1, 99], axis=0)
    longest, num = 0, 0
    for path in paths:
        still = np.ones(len(path), bool)
        moves = (np.abs(ways(path, span)) > 0.01 * np.maximum(high - low, 1e-9)).any(axis=1)
        for start in np.flatnonzero(moves):
            still[start + 1 : start + span + 1] = False
        num += int(still.sum())
        edges = np.flatnonzero(np.diff(still.astype(np.int8), prepend=0, append=0))
        longest = max(longest, int((edges[1::2] - edges[::2]).max(initial=0)))
    share, seconds = num / sample.num_rows, longest / sample.fps
    value = "idle" if share > _IDLE_SHARE or seconds > _IDLE_S else "moving"
    return Finding("motion", (), value, f"{share:.0%} of the frames at rest, up to {longest}, {seconds:.1f} s, at once")


def turns_of(episodes: Sequence[F64]) -> F64:
    """[D] a whole turn in the unit of each dimension of the episodes [L, D], where it may be an angle kept within one:
    its values go through one, of 2 pi or of 360; infinite elsewhere."""
    ranges = np.ptp(np.concatenate(episodes), axis=0)
    turns = np.full(len(ranges), np.inf)
    for size in (2 * np.pi, 360.0):
        turns[np.abs(ranges - size) < 0.06 * size] = size
    return turns


def unwrapped(angles: F64, turns: F64) -> F64:
    """[L, P] without the jumps of a whole one of the `turns` [P]."""
    step = np.diff(angles, axis=0)
    jumps = np.where(np.abs(np.abs(step) - turns) < 0.06 * turns, np.sign(step), 0.0)
    return angles - np.where(np.isfinite(turns), turns, 0.0) * np.vstack([np.zeros_like(angles[:1]), jumps.cumsum(0)])


def ways(series: F64, span: int) -> F64:
    """[L - span, P] how far each goes in `span` frames; no row where there are fewer."""
    return series[span:] - series[: max(len(series) - span, 0)]
