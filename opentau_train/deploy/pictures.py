"""Pictures as robots have them, brought to the size in which the training's reader decodes them.

Pictures of that size, as those of cameras that the training didn't scale, are left as they are. The reader scales
others with libswscale, which needs a library for videos; here the same filters (`data.scaling`) are NumPy's, the mean
over each pixel's area, and Pillow's, a triangle as wide as a pixel of the result. What libswscale makes of a video has
its colours in half of the columns, and so has it here. On pictures as cameras take them the two differ by about 1 of
255 levels on average, and 99 of 100 values by 4 at most.
"""

from __future__ import annotations

import math
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


def frames_of(value: Any, camera: str, size: tuple[int, int], *, halved: bool, scaling: str) -> NDArray[np.uint8]:
    """[N, H', W', 3] uint8 RGB, as large as fits into `size` (H, W), of a picture or of N frames, oldest first: colours
    last or first, uint8 or floats in [0, 1]. `halved`: scaled as frames of videos are, by the filter `scaling`
    (`data.scaling`). Raises `UserError` for what is no picture."""
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
    return np.stack([_scaled(frame, (height, width), halved, scaling) for frame in frames])


def _scaled(frame: NDArray[np.uint8], size: tuple[int, int], halved: bool, scaling: str) -> NDArray[np.uint8]:
    """[H', W', 3] of [H, W, 3]."""
    fine = _filtered(frame, size, scaling)
    if halved and size[1] % 2 == 0:  # libswscale gives odd widths all of their colours
        coarse = np.repeat(_filtered(frame, (size[0], size[1] // 2), scaling), 2, axis=1)
        fine = coarse + ((fine - coarse) @ _LUMA)[..., None]
    return np.rint(fine).clip(0, 255).astype(np.uint8)


def _filtered(frame: NDArray[np.uint8], size: tuple[int, int], scaling: str) -> NDArray[Any]:
    """[H', W', 3] of [H, W, 3]. Larger pictures than it are interpolated, as libswscale's are."""
    height, width = frame.shape[:2]
    if scaling != "area" or size[0] > height or size[1] > width:
        return np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BILINEAR), np.float32)
    return _means(_means(frame, size[0]).swapaxes(0, 1), size[1]).swapaxes(0, 1)


def _means(values: NDArray[Any], num: int) -> NDArray[np.float32]:
    """[num, ...] of [N, ...]: the means over `num` equal stretches of the first axis. Pixel after pixel of all
    stretches at once, so that it takes no more memory than the values have, however many they are."""
    edges = np.arange(num + 1) * (len(values) / num)
    begin, end, first = edges[:-1], edges[1:], edges[:-1].astype(np.int64)
    total = np.zeros((num, *values.shape[1:]), np.float32)
    for pixel in range(math.ceil(len(values) / num) + 1):
        place = first + pixel
        share = (np.minimum(end, place + 1) - np.maximum(begin, place)).clip(0).astype(np.float32)
        total += share.reshape(-1, *[1] * (values.ndim - 1)) * values[np.minimum(place, len(values) - 1)]
    return total * np.float32(num / len(values))


def _no_picture(camera: str, frames: NDArray, what: str) -> UserError:
    return UserError(
        f"camera '{camera}' gives {frames.dtype} {list(frames.shape)}, which is no picture: {what}",
        where="the observation",
        remedy="give [H, W, 3] or [3, H, W] RGB, uint8 or floats in [0, 1], or [N, ...] for N frames, oldest first",
    )
