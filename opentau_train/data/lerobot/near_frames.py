"""Which rows' pictures a window has beside its own: earlier ones and later ones. Pure: arrays in, arrays out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.chunk import SNAP_ROWS


def history_rows(
    frame: int,
    history: int,
    step: float = 1.0,
    seconds: NDArray[np.float64] | None = None,
    fps: float | None = None,
) -> NDArray[np.int64]:
    """[h+1] rows of the images of the window at `frame`, oldest first: the nearest to `step` rows apart, or with
    `seconds` [L], the rows' times, to 1 / `fps` seconds apart (the later one in the middle of two); never before the
    episode's start."""
    steps = np.arange(history, -1, -1)
    if seconds is None or fps is None:
        place = frame - np.rint(steps * step)
    else:
        place = np.interp(seconds[frame] - steps / fps, seconds[: frame + 1], np.arange(frame + 1))
        place = np.minimum(np.floor(place + 0.5 + SNAP_ROWS), frame)
    return np.maximum(place, 0).astype(np.int64)


def future_rows(place: NDArray[np.float64], num: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(rows [F] of the images at the places [F] (`chunk_places`) of an episode of `num` rows: the nearest, the later
    one in the middle of two; is_pad [F]). Places after the last row take it and are marked."""
    return np.minimum(np.floor(place + 0.5 + SNAP_ROWS), num - 1).astype(np.int64), place > num - 1
