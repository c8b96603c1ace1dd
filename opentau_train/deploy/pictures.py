"""Pictures as robots have them, brought to the size in which the training's reader decodes them.

Pictures of that size, as those of cameras that the training didn't scale, are left as they are. The reader scales
others with libswscale, which needs a library for videos; here Pillow does, with the same filter, a triangle as wide as
a pixel of the result. What libswscale makes of a video has its colours in half of the columns, and so has it here. On
pictures as cameras take them the two differ by less than 1 of 255 levels on average, and 99 of 100 values by 4 at most.
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
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""The shares of red, green and blue in brightness (ITU-R BT.601)."""


def frames_of(value: Any, camera: str, size: tuple[int, int], *, halved: bool) -> NDArray[np.uint8]:
    """[N, H', W', 3] uint8 RGB, as large as fits into `size` (H, W), of a picture or of N frames, oldest first: colours
    last or first, uint8 or floats in [0, 1]. `halved`: scaled as frames of videos are. Raises `UserError` for what is
    no picture."""
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
    return np.stack([_scaled(Image.fromarray(frame), (width, height), halved) for frame in frames])


def _scaled(picture: Image.Image, size: tuple[int, int], halved: bool) -> NDArray[np.uint8]:
    """`size` is (W, H)."""
    fine = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    if not halved or size[0] % 2:  # libswscale gives odd widths all of their colours
        return fine
    half = picture.resize((size[0] // 2, size[1]), Image.Resampling.BILINEAR)
    coarse = np.repeat(np.asarray(half, np.float32), 2, axis=1)
    return np.rint(coarse + ((fine - coarse) @ _LUMA)[..., None]).clip(0, 255).astype(np.uint8)


def _no_picture(camera: str, frames: NDArray, what: str) -> UserError:
    return UserError(
        f"camera '{camera}' gives {frames.dtype} {list(frames.shape)}, which is no picture: {what}",
        where="the observation",
        remedy="give [H, W, 3] or [3, H, W] RGB, uint8 or floats in [0, 1], or [N, ...] for N frames, oldest first",
    )
