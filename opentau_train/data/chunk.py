"""Which rows the action chunk of a window takes. Pure: arrays in, arrays out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Between = Callable[[NDArray, NDArray, NDArray, NDArray], None]
"""Writes into the last [T, A] what lies the third [T] of the way from the first to the second [T, A], where that isn't
on a straight line."""

SNAP_ROWS = 1e-2
"""A step this near to a row is that row: float32 timestamps and rates such as 29.97 don't meet rows exactly."""


def row_step(native_fps: float, fps: float | None) -> float:
    """Rows between two steps of a chunk taken at `fps`; 1.0 where that is the dataset's own rate (or None)."""
    return 1.0 if fps is None else native_fps / fps


def chunk_rows(chunk_length: int, step: float) -> int:
    """Rows that a chunk reaches over, its first row included, when its steps are `step` rows apart."""
    return math.ceil((chunk_length - 1) * step - SNAP_ROWS) + 1


def chunk_places(
    frame: int, chunk_length: int, step: float, seconds: NDArray[np.float64] | None = None, fps: float | None = None
) -> NDArray[np.float64]:
    """[T] f64 places between the rows of an episode, of the steps of the chunk at row `frame`: `step` rows apart, or
    with `seconds` [L], the rows' times, 1 / `fps` seconds apart. Places after the last row lie beyond L - 1."""
    steps = np.arange(chunk_length)
    if seconds is None or fps is None or len(seconds) < 2:
        place = frame + steps * step
    else:
        end = seconds[-1] + chunk_length / fps + 1.0
        rows = np.arange(len(seconds) + 1, dtype=np.float64)
        rows[-1] = rows[-2] + (end - seconds[-1]) * fps * step  # a line on, so that what is after the end stays there
        place = np.interp(seconds[frame] + steps / fps, np.append(seconds, end), rows)
    nearest = np.rint(place)
    return np.where(np.abs(place - nearest) <= SNAP_ROWS, nearest, place)


def chunks_reaching(length: int | NDArray, offsets: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many chunks of an episode of `length` rows have a row `offsets` after their start: those that start at its
    first rows. Broadcasts."""
    return np.maximum(np.floor(length - offsets), 0).astype(np.int64)


def rows_at(
    values: NDArray[np.float32],
    place: NDArray[np.float64],
    held: NDArray[np.bool_] | None = None,
    between: Between | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(values [T, A] f32 at the places [T] between the rows of `values` [L, A], is_pad [T]).

    Linear between two rows, but for what is `between` them; the dimensions under `held` [A] (flags, counts) keep the
    earlier row's. Places after the last row take it and are marked.
    """
    last = len(values) - 1
    is_pad = place > last
    place = np.minimum(place, last)
    low = np.floor(place).astype(np.int64)
    share = (place - low).astype(np.float32)[:, None]
    if not share.any():
        return values[low], is_pad
    high, part = values[np.minimum(low + 1, last)], share[:, 0]
    if held is not None:
        share = np.where(held, np.float32(0), share)
    out = values[low] * (1 - share) + high * share
    if between is not None:
        between(values[low], high, part, out)
    return out, is_pad


def next_rows(values: NDArray[np.float32], row: int, num: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """`rows_at` for the `num` T rows of `values` [L, A] from `row` on: (a copy [T, A] f32, is_pad [T])."""
    rows = values[row : row + num]
    if len(rows) == num:
        return rows.copy(), np.zeros(num, bool)
    return np.concatenate([rows, np.repeat(rows[-1:], num - len(rows), axis=0)]), np.arange(num) >= len(rows)
