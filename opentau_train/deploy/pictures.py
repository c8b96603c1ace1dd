"""Pictures as robots have them, brought to the size in which the training's reader decodes them.

The reader scales in the video's own colours while it decodes (libswscale), which needs a library for videos. Here
Pillow does it, with the same filter (a triangle as wide as the step between two pixels of the result, and one of the
picture at least): for pictures of the size that the reader gives nothing is scaled, and all is the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opentau_train.data.decode.fit import fit
from opentau_train.errors import UserError

_ROUNDING = 1e-3
"""How far floats may leave [0, 1]."""


def frames_of(value: Any, camera: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """[N, H', W', 3] uint8 RGB, as large as fits into `size` (H, W), of a picture or of N frames, oldest first: colours
    last or first, uint8 or floats in [0, 1]. Raises `UserError` for what is none."""
    frames = np.asarray(value)
    if frames.ndim == 3:
        frames = frames[None]
    if frames.ndim == 4 and frames.shape[-1] != 3 and frames.shape[1] == 3:
        frames = np.moveaxis(frames, 1, -1)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise _no_picture(camera, frames, "its shape")
    if np.issubdtype(frames.dtype, np.floating):
        if not (frames.min() >= -_ROUNDING and frames.max() <= 1 + _ROUNDING):  # false for NaN, too
            raise _no_picture(camera, frames, f"its range, {frames.min():g} to {frames.max():g}")
        frames = np.rint(frames.clip(0, 1) * 255).astype(np.uint8)
    if frames.dtype != np.uint8:
        raise _no_picture(camera, frames, "its type")
    height, width = fit(frames.shape[1], frames.shape[2], size)
    if frames.shape[1:3] == (height, width):
        return frames
    box = width, height
    return np.stack([np.asarray(Image.fromarray(f).resize(box, Image.Resampling.BILINEAR)) for f in frames])


def _no_picture(camera: str, frames: NDArray, what: str) -> UserError:
    return UserError(
        f"camera '{camera}' gives {frames.dtype} {list(frames.shape)}, which is no picture: {what}",
        where="the observation",
        remedy="give [H, W, 3] or [3, H, W] RGB, uint8 or floats in [0, 1], or [N, ...] for N frames, oldest first",
    )
