"""Finders of which end of a gripper's values is open."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from opentau_train.data.lint.finding import LIKELY, UNKNOWN, Finding
from opentau_train.data.lint.sample import F64
from opentau_train.data.lint.units import gripper_range

OPEN, CLOSED = "open", "closed"
"""The end that has the larger number."""
LEAST_R2 = 0.4
"""Of the state's way and the command's, for their common direction to be believed."""
_LEAST_GAP, _LEAST_SPREAD, _LEAST_SHARE = 0.04, 0.02, 0.3
"""Of the range: what an object between the fingers holds them apart, and how much objects differ; and of the rests at
that end, how many meet one."""


def ends(rows: F64) -> tuple[float, float]:
    """The ends of a gripper's values [N]: those of its usual range, or its own extremes."""
    low, high = gripper_range(rows) or np.percentile(rows, [0.5, 99.5])
    return float(low), float(max(high, low + 1e-9))


def polarity(dims: tuple[str, ...], state: Sequence[F64], command: Sequence[F64], sign: float, span: int) -> Finding:
    """Which end of the gripper's `state` [L, 1] is open. Fingers that are told to close stand still where an object
    stops them, at widths that differ from object to object: their state stays on the open side of the `command`.
    Nothing stops them from opening. `sign` < 0: the command runs against the state; `span` frames without motion are
    a rest."""
    (low, high), (start, end) = ends(np.concatenate(state)), ends(np.concatenate(command))
    gaps: dict[bool, list[float]] = {False: [], True: []}  # of rests, by whether the command is in the upper half
    for s, c in zip(state, command, strict=True):
        s, c = (s[:, 0] - low) / (high - low), (c[:, 0] - start) / (end - start)
        c = 1 - c if sign < 0 else c
        for place in _rests(s, c, span):
            gaps[bool(c[place] > 0.5)].append(float(s[place] - c[place]))
    below, above = np.array(gaps[False]), np.array(gaps[True])
    if min(len(below), len(above)) < 5:
        return Finding("polarity", dims, UNKNOWN, f"rests at both ends: {len(below)}, {len(above)}")
    stopped_low = _stopped(below) and not _stopped(-above) and np.std(above) < 0.5 * np.std(below)
    stopped_high = _stopped(-above) and not _stopped(below) and np.std(below) < 0.5 * np.std(above)
    value = OPEN if stopped_low else CLOSED if stopped_high else UNKNOWN
    evidence = (
        f"rests behind the command by {np.mean(below):+.2f} (sd {np.std(below):.2f}) of the range at its low end, "
        f"{np.mean(above):+.2f} (sd {np.std(above):.2f}) at its high end"
    )
    return Finding("polarity", dims, value, evidence)


def usual_polarity(dims: tuple[str, ...], state: Sequence[F64]) -> Finding:
    """Which end of a gripper's `state` [L, 1] is open, where it is as usual: episodes begin with an open hand, which
    then closes. Where nothing is ever held, closing and opening are mirror images, and this is all that there is: no
    more than likely, as a task may begin with a closed hand."""
    low, high = ends(np.concatenate(state))
    share = [(s[:, 0] - low) / (high - low) for s in state]
    starts = np.array([s[0] for s in share if np.ptp(s) > 0.5])
    at_low, at_high = (starts < 0.35).sum(), (starts > 0.65).sum()
    evidence = f"of {len(starts)} episodes in which it moves {at_low} begin at the low end, {at_high} at the high end"
    clear = len(starts) >= 5 and max(at_low, at_high) >= 0.9 * len(starts)
    return Finding("polarity", dims, (OPEN if at_high else CLOSED) if clear else UNKNOWN, evidence, LIKELY)


def other_end(value: str) -> str:
    return {OPEN: CLOSED, CLOSED: OPEN}.get(value, value)


def _rests(s: F64, c: F64, span: int) -> list[int]:
    """The middle of each stretch of `span` frames and more in which neither moves 2 % of its range."""
    step = np.maximum(np.abs(np.diff(s)), np.abs(np.diff(c)))
    moving = np.flatnonzero(step > 0.02)
    bounds = np.concatenate([[-1], moving, [len(step)]])
    return [int(b + a + 1) // 2 for a, b in pairwise(bounds) if b - a > span]


def _stopped(gaps: F64) -> bool:
    """Whether objects hold the fingers apart in enough of the rests: all may be short of the command (a sensor's gain),
    and a few caught in motion."""
    apart = gaps - np.percentile(gaps, 10) > _LEAST_GAP
    return bool(apart.mean() > _LEAST_SHARE and gaps.mean() > _LEAST_GAP and gaps.std() > _LEAST_SPREAD)
