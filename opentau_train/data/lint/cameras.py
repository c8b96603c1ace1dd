"""The finder of cameras that changed places between episodes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.lint.finding import UNKNOWN, Finding
from opentau_train.data.lint.sample import F64

_LEAST_EPISODES = 4
_APART, _LEAST_SHARE = 3.5, 0.35
"""How far apart the cameras must be, in standard deviations between episodes; and an exchanged episode from the middle
between them, as a share of what the others are."""


def swapped(numbers: Sequence[int], histograms: dict[str, F64]) -> list[Finding]:
    """Episodes in which two cameras stand in each other's columns: the pictures of each resemble the other one's in the
    other episodes. Unknown where a camera's own pictures differ between episodes nearly as much as two cameras'."""
    findings = []
    for one, other in combinations(histograms, 2):
        a, b = np.sqrt(histograms[one]), np.sqrt(histograms[other])
        good = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
        if good.sum() < _LEAST_EPISODES:
            continue
        which, (side, places) = np.array(numbers)[good], _sides(a[good], b[good])
        apart = places.sum(axis=1)
        middle, spread = float(np.median(apart)), float(apart.std())
        off = side < 0
        clear = middle > _APART * spread and middle > 0 and off.sum() < len(off) / 2
        sure = off & (apart > _LEAST_SHARE * middle) & (places > 0).all(axis=1)
        lost = tuple(str(n) for n in which[sure]) if clear else ()
        value = UNKNOWN if not clear or (off & ~sure).any() else "swapped" if lost else "steady"
        evidence = f"the cameras differ by {middle / max(spread, 1e-9):.1f} standard deviations between episodes"
        findings.append(Finding(f"cameras {one}, {other}", lost if value == "swapped" else (), value, evidence))
    return findings


def _sides(a: F64, b: F64) -> tuple[F64, F64]:
    """([E] +1 for an episode whose pictures `a` and `b` [E, K] stand as in most, -1 for one in which they are
    exchanged; [E, 2] how far each of the two, put straight, lies from the middle between the cameras towards its own).

    The directions in which a camera's pictures differ little from episode to episode count most, and each episode is
    judged by the others.
    """
    apart, num = a - b, len(a)
    side = np.where(apart @ np.linalg.svd(apart, full_matrices=False)[2][0] < 0, -1.0, 1.0)
    for _ in range(8):
        straight = side[:, None] > 0
        x, y = np.where(straight, a, b), np.where(straight, b, a)
        spread = (x.var(axis=0) + y.var(axis=0)) / 2
        x, y = (x.sum(axis=0) - x) / (num - 1), (y.sum(axis=0) - y) / (num - 1)
        way = (x - y) / (spread + 0.1 * spread.mean() + 1e-12)
        places = np.stack([((v - (x + y) / 2) * way).sum(axis=1) for v in (a, b)], axis=1)
        before, side = side, np.where(places[:, 0] < places[:, 1], -1.0, 1.0)
        if (side == before).all():
            break
    places = side[:, None] * places * [1, -1]
    return side * (np.sign(side.sum()) or 1.0), places


def histogram(picture: NDArray[np.uint8]) -> F64:
    """[256] the share of the pixels of a picture [H, W, 3] that have each of 4 x 4 x 4 colours in each of its
    quarters."""
    height, width, _ = picture.shape
    codes = (picture // 64).astype(np.int64) @ [16, 4, 1]
    codes += 64 * ((2 * np.arange(height) // height)[:, None] * 2 + (2 * np.arange(width) // width)[None])
    return np.bincount(codes.ravel(), minlength=256) / codes.size
