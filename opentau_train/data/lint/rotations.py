"""Finders of rotation formats, of quaternions' signs and of the place of their real part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opentau_train.data.lint.finding import UNKNOWN, Finding
from opentau_train.data.lint.sample import F64

NONE, EULER = "no rotation", "euler"
SAME_END, OTHER_END = "real parts at the same end", "real parts at different ends"
_UNIT = 0.02
_MOVES = 0.005
"""Standard deviation from which a component counts as moving."""
_SMALL, _ACTIVE = 0.15, 0.1


def formats(rows: F64) -> list[tuple[int, int, str]]:
    """(first dimension, number, format) of the rotations that the rows [N, D] show: nine or six dimensions that are
    orthonormal rows or columns, or four of unit norm. Three angles look like any others and aren't among them."""
    out, place, width = list[tuple[int, int, str]](), 0, rows.shape[1]
    while place < width:
        for num, name in ((9, "matrix"), (6, "rot6d"), (4, "quaternion")):
            if place + num <= width and is_rotation(rows[:, place : place + num]):
                out.append((place, num, name))
                place += num
                break
        else:
            place += 1
    return out


def is_rotation(rows: F64) -> bool:
    """Whether 99 % of rows [N, D] are rotations, and move."""
    return bool((rows.std(axis=0) > _MOVES).sum() >= 2 and fit(rows) > 0.99)


def fit(rows: F64) -> float:
    """The share of rows [N, 9], [N, 6] (rows or columns of a rotation) or [N, 4] that are orthonormal."""
    if rows.shape[1] == 4:
        wrong = np.abs(np.linalg.norm(rows, axis=1) - 1)
    else:
        axes = rows.reshape(len(rows), -1, 3)
        wrong = np.abs(axes @ axes.transpose(0, 2, 1) - np.eye(axes.shape[1])).max(axis=(1, 2)) / 2
    return float(np.mean(wrong < _UNIT))


def angles(dims: tuple[str, ...], episodes: Sequence[F64]) -> Finding:
    """Whether three dimensions [L, 3] are `euler` angles or an `axis_angle`, by how they jump: an Euler angle by a
    whole turn by itself, an axis at half a turn to its opposite, all three at once."""
    alone, opposite = 0, 0
    for x in episodes:
        size = 360.0 if np.abs(x).max() > 13 else 2 * np.pi
        step, norm = np.sort(np.abs(np.diff(x, axis=0)), axis=1), np.linalg.norm(x, axis=1)
        clear = np.sort(np.abs(x[1:]), axis=1)[:, 1] > 0.05 * size  # else an axis along one dimension does both
        alone += int((clear & (np.abs(step[:, 2] - size) < 0.06 * size) & (step[:, 1] < 0.03 * size)).sum())
        at_half = np.abs(norm - size / 2) < 0.03 * size
        flipped = np.linalg.norm(x[1:] + x[:-1], axis=1) < 0.1 * size
        opposite += int((clear & at_half[1:] & at_half[:-1] & flipped).sum())
    value = EULER if alone > 3 * opposite else "axis_angle" if opposite > 3 * alone else UNKNOWN
    evidence = f"{alone} jumps of one dimension by a turn, {opposite} of all three to the opposite axis"
    return Finding("rotation", dims, value, evidence)


def signs(dims: tuple[str, ...], episodes: Sequence[F64]) -> Finding:
    """Whether quaternions [L, 4] are `continuous`, or of `mixed sign`: q and -q are the same rotation, and a step or
    another episode may turn from one to the other."""
    flips = sum(int(((q[1:] * q[:-1]).sum(axis=1) < 0).sum()) for q in episodes)
    main = _main(episodes)
    starts = np.array([q[0] @ main for q in episodes])
    sides = (starts > 0.5).sum(), (starts < -0.5).sum()
    value = "mixed sign" if flips or min(sides) else "continuous"
    return Finding(
        "quaternion sign", dims, value, f"{flips} flips; {sides[0]} episodes begin on one side, {sides[1]} on the other"
    )


def written(dims: tuple[str, ...], episodes: Sequence[F64]) -> Finding:
    """The format of four, six or nine dimensions [L, D]. Quaternions have their real part first or last: where they
    flip to keep one component positive, that is the real part; and a hand that points down or up and turns about the
    vertical keeps two components small, which are the first two (`quat_xyzw`), or the first and last (`quat_wxyz`).
    Other pairs may be of either. `none of these` where hardly a row is a rotation of its width."""
    q = np.concatenate(episodes)
    name = {6: "rot6d", 9: "matrix"}.get(len(dims), UNKNOWN)
    if not is_rotation(q):
        value = NONE if len(dims) in (4, 6, 9) and fit(q) < 0.5 else UNKNOWN
        return Finding("rotation", dims, value, f"{fit(q):.0%} of the rows are orthonormal")
    if name != UNKNOWN:
        return Finding("rotation", dims, name, f"{fit(q):.0%} of the rows are orthonormal")
    flips = sum(int(((e[1:] * e[:-1]).sum(axis=1) < 0).sum()) for e in episodes)
    never = q.min(axis=0) > -1e-3
    if flips >= 3 and never[0] != never[3] and not never[1:3].any():
        value = "quat_wxyz" if never[0] else "quat_xyzw"
        return Finding("rotation", dims, value, f"{flips} flips, which keep the real part positive")
    size = np.sqrt(np.mean(q * q, axis=0))
    place = np.argsort(size)
    clear = size[place[1]] < _SMALL and size[place[2]] > max(_ACTIVE, 2 * size[place[1]])
    small = tuple(sorted(place[:2].tolist())) if clear else ()
    value = {(0, 3): "quat_wxyz", (0, 1): "quat_xyzw"}.get(small, UNKNOWN)
    shown = ", ".join(f"{s:.2f}" for s in size)
    return Finding("rotation", dims, value, f"components of root mean square {shown}", 0.8)


def ends(dims: tuple[str, ...], one: Sequence[F64], other: Sequence[F64]) -> Finding:
    """Whether two sets of quaternions of the same robot have their real part at the same end: the second one's main
    directions are the first one's, or are when it is moved to the other end. Unknown where neither fits, or both do."""
    a, b = (_moments(q) for q in (one, other))
    roll = np.array([1, 2, 3, 0])
    same = float(np.linalg.norm(a - b))
    moved = min(float(np.linalg.norm(a - b[np.ix_(p, p)])) for p in (roll, np.argsort(roll)))
    clear = min(same, moved) < 0.35 and min(same, moved) < 0.4 * max(same, moved)
    value = (OTHER_END if moved < same else SAME_END) if clear else UNKNOWN
    return Finding("quaternion order", dims, value, f"main directions differ by {same:.2f}, moved by {moved:.2f}")


def _moments(episodes: Sequence[F64]) -> F64:
    """[4, 4] the mean of q q', which knows no sign."""
    q = np.concatenate(episodes)
    return q.T @ q / len(q)


def _main(episodes: Sequence[F64]) -> F64:
    return np.linalg.eigh(_moments(episodes))[1][:, -1]
