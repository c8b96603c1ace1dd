"""Finders about whole episodes: their rate, copies of one another, and cameras that changed places."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.lint.finding import UNKNOWN, Finding
from opentau_train.data.lint.sample import F64, EpisodeSample

_RATE_OFF = 0.02
_SHARED_ROWS, _NEAR = 0.5, 0.005
_APART = 2.0


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


def swapped(numbers: Sequence[int], histograms: dict[str, F64]) -> list[Finding]:
    """Episodes in which two cameras stand in each other's columns: the pictures of each resemble the other one's in the
    other episodes. Unknown where a camera's own pictures differ between episodes nearly as much as two cameras'."""
    findings = []
    for one, other in combinations(histograms, 2):
        a, b = histograms[one], histograms[other]
        good = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
        a, b, which = a[good], b[good], np.array(numbers)[good]
        if len(a) < 4:
            continue
        crossed = _distances(a, b)
        straight = _distances(a, a) + _distances(b, b), crossed + crossed.T
        # Side +1 or -1 of each episode: two on the same side are near straight, two on different sides crossed.
        differ = straight[1] - straight[0]
        np.fill_diagonal(differ, 0.0)
        side = np.sign(np.linalg.eigh(differ)[1][:, -1])
        side[side == 0] = 1
        side *= np.sign(side.sum()) or 1
        agree = side[:, None] * side[None, :] > 0
        np.fill_diagonal(agree, False)
        off = ~agree & ~np.eye(len(a), dtype=bool)
        near = np.concatenate([straight[0][agree], straight[1][off]])
        far = np.concatenate([straight[1][agree], straight[0][off]])
        clear = np.median(far) > _APART * np.median(near) and np.percentile(near, 90) < np.percentile(far, 10)
        lost = tuple(str(n) for n in which[side < 0])
        value = UNKNOWN if not clear or len(lost) == len(a) / 2 else "swapped" if lost else "steady"
        evidence = (
            f"distance {np.median(near) / 2:.2f} to its own pictures, {np.median(far) / 2:.2f} to the other camera's"
        )
        findings.append(Finding(f"cameras {one}, {other}", lost if value == "swapped" else (), value, evidence))
    return findings


def histogram(picture: NDArray[np.uint8]) -> F64:
    """[64] the share of the pixels of a picture [H, W, 3] that have each of 4 x 4 x 4 colours."""
    codes = (picture.reshape(-1, 3) // 64).astype(np.int64) @ [16, 4, 1]
    return np.bincount(codes, minlength=64) / len(codes)


def _distances(one: F64, other: F64) -> F64:
    """[E, F] Hellinger distances, in [0, 1]."""
    overlap = np.sqrt(one) @ np.sqrt(other).T
    return np.sqrt(np.clip(1 - overlap, 0, 1))
