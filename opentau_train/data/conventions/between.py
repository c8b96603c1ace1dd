"""Rotations between two rows: what a chunk at another rate than its dataset's takes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.convention import ANGLES, Convention
from opentau_train.data.conventions.places import locate
from opentau_train.data.conventions.rotations import from_matrices, to_matrices


@dataclass(frozen=True)
class RotationsBetween:
    """Turns at a constant speed about one axis (slerp) from row to row, for the `parts` ((dimensions, form), ...) of
    the actions that are declared rotations. See `WindowSpec.between`."""

    parts: tuple[tuple[tuple[int, ...], str], ...]

    def __call__(self, low: NDArray, high: NDArray, share: NDArray, out: NDArray) -> None:
        """Writes into `out` [T, A] the rotations that lie `share` [T] of the way from the rows `low` to `high` [T, A],
        in the numbers, of those that mean the same rotation, that are nearest to the nearer row's."""
        rows = np.flatnonzero(share)
        for dims, form in self.parts:
            at = np.ix_(rows, np.array(dims))
            start, end = (to_matrices(values[at], form) for values in (low, high))
            way = from_matrices(start.mT @ end, "axis_angle") * share[rows, None]
            turned = from_matrices(start @ to_matrices(way, "axis_angle"), form)
            out[at] = _nearest(turned, np.where(share[rows, None] < 0.5, low[at], high[at]), form)


def rotations_between(declared: Convention, action_names: tuple[str, ...]) -> RotationsBetween | None:
    """For the actions that a source declares; None where no part is known to be a rotation."""
    parts = []
    for located in locate(declared.actions, action_names, "convention.actions") if declared.actions else ():
        form, unit = located.part.rotation, located.part.unit
        if form is not None and (form not in ANGLES or unit is not None):
            parts.append((located.places, f"{form}:deg" if unit == "deg" else form))
    return RotationsBetween(tuple(parts)) if parts else None


def _nearest(values: NDArray, near: NDArray, form: str) -> NDArray:
    """[N, n] the numbers of the same rotations as `values` that are nearest to `near`."""
    name, _, degrees = form.partition(":")
    turn = 360.0 if degrees else 2 * np.pi
    if name.startswith("quat"):
        same = [values, -values]
    elif name == "axis_angle":
        size = np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-9)
        same = [values, values * (1 - turn / size)]
    elif name.startswith("euler"):
        other = np.stack([values[:, 0] + turn / 2, turn / 2 - values[:, 1], values[:, 2] + turn / 2], axis=1)
        same = [v - turn * np.rint((v - near) / turn) for v in (values, other)]
    else:
        return values
    apart = [np.square(v - near).sum(axis=1, keepdims=True) for v in same]
    return np.where(apart[1] < apart[0], same[1], same[0])
