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
    span = sample.frames(_SPAN_S)
    lags = np.arange(min(-2, round(_LAGS_S[0] * sample.fps)), max(5, round(_LAGS_S[1] * sample.fps)) + 1)
    pairs = sample.pairs
    sums = np.zeros((2, len(lags), 3, len(pairs)))  # of x x, y y and x y
    for state, actions in zip(sample.state, sample.actions, strict=True):
        way = _ways(unwrapped(state[:, pairs[:, 0]]), span)
        own = unwrapped(actions[:, pairs[:, 1]])
        for kind, series in enumerate((own, np.cumsum(own, axis=0) - own)):
            x = _ways(series, span)
            for k, lag in enumerate(lags.tolist()):
                num = max(len(way) - abs(lag), 0)
                u, v = x[max(-lag, 0) :][:num], way[max(lag, 0) :][:num]
                sums[kind, k] += [(u * u).sum(0), (v * v).sum(0), (u * v).sum(0)]
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
    """The dimensions that run into a limit: they arrive at their extreme moving, and stand there exactly."""
    rows = np.concatenate(episodes)
    share = np.zeros(len(names))
    for extreme in (rows.min(axis=0), rows.max(axis=0)):
        often = sum(_arrivals(x, x == extreme) for x in episodes) >= _LEAST_ARRIVALS
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
    paths = [np.where(delta, np.cumsum(a, axis=0), unwrapped(a)) for a in sample.actions]
    low, high = np.percentile(np.concatenate(paths), [1, 99], axis=0)
    longest, num = 0, 0
    for path in paths:
        still = np.ones(len(path), bool)
        moves = (np.abs(_ways(path, span)) > 0.01 * np.maximum(high - low, 1e-9)).any(axis=1)
        for start in np.flatnonzero(moves):
            still[start + 1 : start + span + 1] = False
        num += int(still.sum())
        edges = np.flatnonzero(np.diff(still.astype(np.int8), prepend=0, append=0))
        longest = max(longest, int((edges[1::2] - edges[::2]).max(initial=0)))
    share, seconds = num / sample.num_rows, longest / sample.fps
    value = "idle" if share > _IDLE_SHARE or seconds > _IDLE_S else "moving"
    return Finding("motion", (), value, f"{share:.0%} of the frames at rest, up to {longest}, {seconds:.1f} s, at once")


def unwrapped(angles: F64) -> F64:
    """[L, P] without the jumps of a whole turn, in radians or degrees, of angles kept within one turn."""
    step = np.diff(angles, axis=0)
    turns = np.zeros_like(step)
    for size in (2 * np.pi, 360.0):
        turns += np.where(np.abs(np.abs(step) - size) < 0.06 * size, np.sign(step) * size, 0.0)
    return angles - np.vstack([np.zeros_like(angles[:1]), np.cumsum(turns, axis=0)])


def _ways(series: F64, span: int) -> F64:
    """[L - span, P] how far each goes in `span` frames; no row where there are fewer."""
    return series[span:] - series[: max(len(series) - span, 0)]
