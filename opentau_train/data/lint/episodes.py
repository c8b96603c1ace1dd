"""Finders about whole episodes: their rate, and copies of one another."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from opentau_train.data.lint.finding import UNKNOWN, Finding
from opentau_train.data.lint.sample import EpisodeSample

_RATE_OFF = 0.02
_SHARED_ROWS, _NEAR = 0.5, 0.005


def rate(sample: EpisodeSample) -> Finding:
    """Rows a second, by the timestamps: unknown where gaps or uneven steps part their mean from their median."""
    steps = [np.diff(seconds) for seconds in sample.seconds if len(seconds) > 1]
    if not steps:
        return Finding("rate", (), UNKNOWN, "the rows have no times")
    step = np.concatenate(steps)
    low, middle, high = np.percentile(step, [5, 50, 95])
    mean = float(step.mean())
    as_said = abs(mean * sample.fps - 1) < _RATE_OFF and abs(middle * sample.fps - 1) < _RATE_OFF
    even = middle > 0 and abs(mean / middle - 1) < _RATE_OFF
    value = f"{sample.fps:g}" if as_said else f"{1 / mean:.4g}" if even else UNKNOWN
    return Finding("rate", (), value, f"steps of {1e3 * low:.1f} to {1e3 * high:.1f} ms (90 %), mean {1e3 * mean:.1f}")


def copies(sample: EpisodeSample) -> Finding:
    """Episodes that are (nearly) another one again: half of the shorter one's rows, those in which something moved, are
    the other's; or their courses differ by less than 0.5 % of the dimensions' ranges throughout."""
    both = [np.concatenate(p, axis=1) for p in zip(sample.state, sample.actions, strict=True)]
    span = np.maximum(np.ptp(np.concatenate(both), axis=0), 1e-9) if both else np.ones(1)
    rows, courses = [], []
    for values in both:
        moved = np.ones(len(values), bool)
        moved[1:] = (np.diff(values, axis=0) != 0).any(axis=1)
        rows.append(set(map(hash, map(bytes, values[moved].astype(np.float32)))))
        at = np.linspace(0, len(values) - 1, 32).round().astype(int)
        courses.append(values[at] / span)
    same = []
    for i, j in combinations(range(len(both)), 2):
        fewer = min(len(rows[i]), len(rows[j]))
        shared = fewer >= 5 and len(rows[i] & rows[j]) > _SHARED_ROWS * fewer
        near = abs(len(both[i]) - len(both[j])) <= 1 and len(both[i]) >= 16
        if shared or (
            near and np.ptp(courses[i], axis=0).max() > 0.1 and np.abs(courses[i] - courses[j]).max() < _NEAR
        ):
            same.append((sample.numbers[i], sample.numbers[j]))
    value = "copies" if same else "none"
    shown = ", ".join(f"{b} of {a}" for a, b in same[:8]) + (", ..." if len(same) > 8 else "")
    return Finding(
        "duplicates", tuple(str(n) for n in sorted({b for _, b in same})), value, f"episodes {shown or '(none)'}"
    )
