"""Finders that compare turns in space: the order of Euler angles' axes and of a quaternion's numbers, and the axes that
deltas are taken in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from opentau_train.data.conventions.rotations import from_matrices, to_matrices
from opentau_train.data.lint.finding import LIKELY, UNKNOWN, Finding
from opentau_train.data.lint.motion import agreement, ways
from opentau_train.data.lint.sample import F64, EpisodeSample

FRAMES = ("base", "tool")
_FORMS = {
    3: ("euler_xyz", "euler_zyx", "axis_angle"),
    4: ("quat_xyzw", "quat_wxyz"),
    6: ("rot6d",),
    9: ("matrix",),
}
_LEAST_R2, _CLEARER = 0.8, 0.5
_JUMP, _LEAST_JUMPS = 1.0, 5
"""A turn (rad) from one row to the next that no hand makes."""
_VERTICAL, _LEVEL = 0.8, 0.4
"""Shares of the turning about the vertical: as hands do at a table, and as they don't."""

Turned = Mapping[str, Sequence[F64]]
"""{form: the rotations [L, 3, 3] of each episode, as that form reads them}."""

Scores = Mapping[tuple[str, str], float]
"""{(form, frame): r2}, or {(form of the state, form of the actions): how well they agree}, at most 1."""


def turned(rows: Sequence[F64], told: str = UNKNOWN) -> Turned:
    """The rotations of a part's rows [L, 3], [L, 4], [L, 6] or [L, 9], by each of the forms that begin as `told`."""
    width = rows[0].shape[1]
    forms = [f for f in _FORMS.get(width, ()) if told == UNKNOWN or f.startswith(told)]
    degrees = width == 3 and max(np.abs(r).max() for r in rows) > 13
    return {f: [to_matrices(r, f"{f}:deg" if degrees else f) for r in rows] for f in forms}


def path(rotations: F64) -> F64:
    """[L, 3] the way turned since the first of the rotations [L, 3, 3], rad about the base's axes."""
    return np.cumsum(np.vstack([np.zeros((1, 3)), _steps(rotations)]), axis=0)


def _steps(rotations: F64) -> F64:
    """[L - 1, 3] from each to the next."""
    return from_matrices(rotations[1:] @ rotations[:-1].mT, "axis_angle")


def as_vectors(rows: Sequence[F64]) -> Sequence[F64]:
    """[L, 3] small turns as vectors along their axes; of three numbers all formats are nearly that, at any scale."""
    if rows[0].shape[1] == 3:
        return rows
    forms = turned(rows)
    near = {f: sum(float(np.trace(r, axis1=1, axis2=2).sum()) for r in matrices) for f, matrices in forms.items()}
    return [from_matrices(r, "axis_angle") for r in forms[max(near, key=lambda f: near[f])]]


def by_deltas(sample: EpisodeSample, state: Turned, paths: Sequence[F64] | None, steps: Sequence[F64]) -> Scores:
    """How well the state's `paths` [L, 3] (None: what its rotations turn by) follow the deltas `steps` [L, 3], in the
    axes of the base and in those of the tool, with the state's rotations read in each form."""
    scores = {}
    for form, rotations in state.items():
        ways_of_state = [path(r) for r in rotations] if paths is None else paths
        in_base = [np.squeeze(r @ s[..., None], axis=-1) for r, s in zip(rotations, steps, strict=True)]
        for frame, of_frame in zip(FRAMES, (steps, in_base), strict=True):
            scores[form, frame] = agreement(sample, ways_of_state, of_frame)
    return scores


def by_angles(state: Turned, actions: Turned) -> Scores:
    """How near absolute rotations of the actions are to the state's, in each pair of forms: 1 is everywhere the same.
    A lag that is left in counts against all pairs alike."""
    scores = {}
    for (one, a), (other, b) in ((x, y) for x in state.items() for y in actions.items()):
        apart = np.concatenate([((r - s) ** 2).sum(axis=(1, 2)) for r, s in zip(a, b, strict=True)])
        scores[one, other] = 1 - float(apart.mean()) / 4  # 4: of rotations that have nothing to do with one another
    return scores


def told(scores: Scores, which: int) -> tuple[str, str]:
    """(the first or second name, `which`, of the best of the scores where it is clearly better than all with another
    one, `UNKNOWN` otherwise; the evidence)."""
    best: dict[str, float] = {}
    for names, score in scores.items():
        best[names[which]] = max(score, best.get(names[which], -np.inf))
    order = sorted(best, key=lambda name: -best[name])
    if len(order) < 2:
        return UNKNOWN, "one reading only"
    first, second = (best[name] for name in order[:2])
    clear = first >= _LEAST_R2 and 1 - first < _CLEARER * (1 - second)
    return order[0] if clear else UNKNOWN, f"r2 {first:.3f} as {order[0]}, {second:.3f} as {order[1]}"


def by_itself(dims: tuple[str, ...], forms: Turned, fps: float) -> Finding:
    """The form of absolute rotations in which they turn smoothly, where they jump in the others: what happens near the
    gimbal's lock. Or else, likely, the one in which a hand turns about the vertical: the same numbers in another order
    are as good a hand that turns about the base's x axis."""
    jumps = {f: sum(int((np.linalg.norm(_steps(r), axis=1) > _JUMP).sum()) for r in e) for f, e in forms.items()}
    smooth = [f for f, num in jumps.items() if num * 10 <= max(jumps.values())]
    if max(jumps.values()) >= _LEAST_JUMPS and len(smooth) == 1:
        shown = ", ".join(f"{num} as {f}" for f, num in jumps.items())
        return Finding("rotation", dims, smooth[0], f"jumps by more than a radian: {shown}")
    share = {}
    for form, rotations in forms.items():
        way = np.concatenate([ways(path(r), max(2, round(0.3 * fps))) for r in rotations])
        share[form] = float((way[:, 2] ** 2).sum() / max((way**2).sum(), 1e-12))
    upright = [f for f, s in share.items() if s > _VERTICAL]
    clear = len(upright) == 1 and all(s < _LEVEL for f, s in share.items() if f not in upright)
    shown = ", ".join(f"{s:.0%} as {f}" for f, s in share.items())
    return Finding("rotation", dims, upright[0] if clear else UNKNOWN, f"about the vertical: {shown}", LIKELY)
