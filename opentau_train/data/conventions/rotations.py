"""Formats of rotations, and the transform between them. The arithmetic is scipy's, in float64.

A *form* is a format of `data/convention`, with `:deg` behind it where its angles are degrees:

    euler_xyz, euler_zyx  angles about fixed axes, one after the other in this order: roll, pitch, yaw is euler_xyz
    quat_xyzw, quat_wxyz  a unit quaternion
    axis_angle            the axis, as long as the angle
    rot6d                 the matrix's first column, then its second (Zhou et al., 2019)
    matrix                nine numbers, row by row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.convention import WIDTHS
from opentau_train.data.transforms.base import Record, SampleDraws, Transform

_TINY = 1e-12


@cache
def _rotation() -> Any:
    from scipy.spatial.transform import Rotation  # it takes half a second, and few need it

    return Rotation


def width(form: str) -> int:
    """How many numbers a form has."""
    return WIDTHS[form.partition(":")[0]]


def to_matrices(values: NDArray, form: str) -> NDArray[np.float64]:
    """[..., n] -> [..., 3, 3]. What is no rotation quite, as a policy predicts it, becomes one: quaternions are made as
    long as 1, and of a matrix the first two columns are made orthogonal and give the third."""
    name, _, unit = form.partition(":")
    rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
    if name in ("rot6d", "matrix"):
        first, second = (rows[:, 0:3], rows[:, 3:6]) if name == "rot6d" else (rows[:, 0::3], rows[:, 1::3])
        return _orthonormal(first, second).reshape(*values.shape[:-1], 3, 3)
    if name.startswith("quat"):
        norm = np.linalg.norm(rows, axis=-1, keepdims=True)
        rows = np.where(norm > _TINY, rows, np.eye(4)[_w(name)])
        made = _rotation().from_quat(rows, scalar_first=name == "quat_wxyz")
    elif name == "axis_angle":
        made = _rotation().from_rotvec(np.deg2rad(rows) if unit else rows)
    else:
        made = _rotation().from_euler(name.removeprefix("euler_"), rows, degrees=bool(unit))
    return made.as_matrix().reshape(*values.shape[:-1], 3, 3)


def from_matrices(matrices: NDArray, form: str, *, chunk: bool = False) -> NDArray[np.float64]:
    """[..., 3, 3] -> [..., n]. Of the two quaternions of a rotation it gives the one whose w isn't negative; in a
    `chunk` [..., T, 3, 3] that holds for its first step, and each later one is the nearer to the step before it."""
    name, _, unit = form.partition(":")
    shape = matrices.shape[:-2]
    if name == "matrix":
        return matrices.reshape(*shape, 9)
    if name == "rot6d":
        return np.concatenate([matrices[..., 0], matrices[..., 1]], axis=-1)
    made = _rotation().from_matrix(matrices.reshape(-1, 3, 3), assume_valid=True)
    if name == "axis_angle":
        values = np.rad2deg(made.as_rotvec()) if unit else made.as_rotvec()
    elif name.startswith("quat"):
        return _one_sign(made.as_quat(scalar_first=name == "quat_wxyz").reshape(*shape, 4), _w(name), chunk)
    else:
        values = made.as_euler(name.removeprefix("euler_"), degrees=bool(unit), suppress_warnings=True)
    return values.reshape(*shape, 3)


def _w(name: str) -> int:
    return 0 if name == "quat_wxyz" else 3


def _orthonormal(first: NDArray, second: NDArray) -> NDArray:
    """[N, 3, 3] with the first column along `first` [N, 3], the second in the plane of both."""
    x = first / np.maximum(np.linalg.norm(first, axis=-1, keepdims=True), _TINY)
    y = second - np.sum(x * second, axis=-1, keepdims=True) * x
    y = y / np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), _TINY)
    return np.stack([x, y, np.cross(x, y)], axis=-1)


def _one_sign(quaternions: NDArray, w: int, chunk: bool) -> NDArray:
    sign = np.where(quaternions[..., w] < 0, -1.0, 1.0)
    if chunk:
        near = np.sum(quaternions[..., 1:, :] * quaternions[..., :-1, :], axis=-1)
        sign = np.cumprod(np.concatenate([sign[..., :1], np.where(near < 0, -1.0, 1.0)], axis=-1), axis=-1)
    return quaternions * sign[..., None]


@dataclass(frozen=True)
class Change:
    """A rotation whose numbers begin at `first`, from the form `before` to `after`; `part` is what it is called."""

    first: int
    before: str
    after: str
    part: str = "rotation"

    def check(self, path: str) -> None: ...


@dataclass(frozen=True)
class Rotations(Transform):
    """Takes rotations in the state and in the actions to other forms; `Change.first` rises, and counts dimensions as
    they are before."""

    state: tuple[Change, ...] = ()
    actions: tuple[Change, ...] = ()

    reads: ClassVar = ("state", "actions")
    writes: ClassVar = ("state", "actions")

    @property
    def per_chunk(self) -> bool:
        return any(change.after.startswith("quat") for change in self.actions)

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        return self._changed(record, self.state, self.actions)

    def inverse(self, record: Record) -> Record:
        return self._changed(record, _reversed(self.state), _reversed(self.actions))

    def names(self, state: tuple[str, ...], actions: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return _renamed(state, self.state), _renamed(actions, self.actions)

    def _changed(self, record: Record, state: Sequence[Change], actions: Sequence[Change]) -> Record:
        for name, changes in (("state", state), ("actions", actions)):
            if changes and name in record:
                record[name] = _replaced(record[name], changes, chunk=name == "actions")
        return record


def _replaced(values: NDArray, changes: Sequence[Change], *, chunk: bool) -> NDArray[np.float32]:
    """[..., D] -> [..., D'] f32."""
    pieces, end = [], 0
    for change in changes:
        start, pieces_end = change.first, change.first + width(change.before)
        matrices = to_matrices(values[..., start:pieces_end], change.before)
        pieces += [values[..., end:start], from_matrices(matrices, change.after, chunk=chunk)]
        end = pieces_end
    return np.concatenate([*pieces, values[..., end:]], axis=-1, dtype=np.float32)


def _reversed(changes: Sequence[Change]) -> list[Change]:
    """The changes that undo these; their places count the dimensions after these."""
    made, shift = [], 0
    for change in changes:
        made.append(replace(change, first=change.first + shift, before=change.after, after=change.before))
        shift += width(change.after) - width(change.before)
    return made


def _renamed(names: tuple[str, ...], changes: Sequence[Change]) -> tuple[str, ...]:
    made: list[str] = []
    end = 0
    for change in changes:
        made += names[end : change.first]
        form = change.after.partition(":")[0]
        made += [f"{change.part}.{form}[{i}]" for i in range(width(form))]
        end = change.first + width(change.before)
    return (*made, *names[end:])
