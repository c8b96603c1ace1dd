"""Rotations by the formulas of a textbook, which the program's are compared to."""

from __future__ import annotations

import numpy as np


def about(axis: int, angle: np.ndarray) -> np.ndarray:
    """[..., 3, 3]: by `angle` [...] rad about the axis x, y or z."""
    c, s = np.cos(angle), np.sin(angle)
    made = np.zeros((*np.shape(angle), 3, 3))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    made[..., axis, axis] = 1
    made[..., i, i] = made[..., j, j] = c
    made[..., i, j], made[..., j, i] = -s, s
    return made


def rodrigues(vector: np.ndarray) -> np.ndarray:
    """[..., 3, 3] of an axis as long as the angle [..., 3]."""
    angle = np.linalg.norm(vector, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vector / np.maximum(angle[..., 0], 1e-12), -1, 0)
    zero = np.zeros_like(x)
    k = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*x.shape, 3, 3)
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k)


def of_quaternion(w, x, y, z) -> np.ndarray:
    return np.stack(
        [
            *(1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
            *(2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
            *(2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
        ],
        axis=-1,
    ).reshape(*np.shape(w), 3, 3)


def matrices(values: np.ndarray, form: str) -> np.ndarray:
    """[..., n] in a form -> [..., 3, 3] f64."""
    name, _, unit = form.partition(":")
    values = values.astype(np.float64)
    if unit:
        values = np.deg2rad(values)
    parts = np.moveaxis(values, -1, 0)
    if name.startswith("euler"):
        first, second, third = (about("xyz".index(axis), a) for axis, a in zip(name[-3:], parts, strict=True))
        return third @ second @ first
    if name == "axis_angle":
        return rodrigues(values)
    if name.startswith("quat"):
        return of_quaternion(*(parts if name == "quat_wxyz" else (parts[3], *parts[:3])))
    if name == "matrix":
        return values.reshape(*values.shape[:-1], 3, 3)
    return np.stack([values[..., :3], values[..., 3:], np.cross(values[..., :3], values[..., 3:])], axis=-1)


def some(rng: np.random.Generator, shape: tuple[int, ...], form: str, reach: float = 3.0) -> np.ndarray:
    """[*shape, n] f32: rotations of at most about `reach` rad, as numbers of a form."""
    name, _, unit = form.partition(":")
    axis = rng.normal(size=(*shape, 3))
    axis *= rng.uniform(0, reach, (*shape, 1)) / np.linalg.norm(axis, axis=-1, keepdims=True)
    if name.startswith("euler") or name == "axis_angle":
        values = np.rad2deg(axis) if unit else axis
    elif name.startswith("quat"):
        half = np.linalg.norm(axis, axis=-1, keepdims=True) / 2
        vector = axis / (2 * half) * np.sin(half)
        order = [np.cos(half), vector] if name == "quat_wxyz" else [vector, np.cos(half)]
        values = np.concatenate(order, axis=-1) * rng.choice([-1.0, 1.0], (*shape, 1))
    else:
        made = rodrigues(axis)
        flat = made.reshape(*shape, 9)
        values = flat if name == "matrix" else np.concatenate([made[..., 0], made[..., 1]], axis=-1)
    return values.astype(np.float32)


def angle_between(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[...] rad between rotations [..., 3, 3]; exact where it is small."""
    chord = np.linalg.norm(one - other, axis=(-1, -2)) / np.sqrt(8)
    return 2 * np.arcsin(np.minimum(chord, 1.0))
