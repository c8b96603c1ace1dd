"""What is done to the pixels of one picture, [H, W, 3] uint8 RGB, which gives another one: with OpenCV, and by the
formulae that torchvision publishes for the operations of the same names, rounded to whole levels after each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

cv2.setNumThreads(0)  # the loader's workers are the parallelism: a pool of threads in each would fight over the cores

Picture = NDArray[np.uint8]
_cv: Any = cv2  # whose stubs take and give other types than the arrays that it works with


class Box(NamedTuple):
    """A part of a picture, in shares of its width and height."""

    left: float = 0.0
    top: float = 0.0
    width: float = 1.0
    height: float = 1.0

    def pixels(self, height: int, width: int) -> tuple[slice, slice]:
        """(rows, columns) of the part in a picture of `height` x `width` pixels, at least one each way."""
        rows, columns = max(1, round(self.height * height)), max(1, round(self.width * width))
        top, left = min(round(self.top * height), height - rows), min(round(self.left * width), width - columns)
        return slice(top, top + rows), slice(left, left + columns)


def place(
    picture: Picture, box: Box, size: tuple[int, int], degrees: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)
) -> Picture:
    """The picture's part `box` scaled to `size` (H, W), turned counterclockwise about its middle by `degrees` and moved
    by `shift` (to the right, downwards; shares of the size), bilinear and in one step. What comes into view is what the
    picture has around the box, black where it ends."""
    rows, columns = box.pixels(*picture.shape[:2])
    if not degrees and not any(shift):
        part = picture[rows, columns]
        return part if part.shape[:2] == size else _cv.resize(part, size[::-1], interpolation=_cv.INTER_LINEAR)
    height, width = size
    scale = np.diag([(columns.stop - columns.start) / width, (rows.stop - rows.start) / height])
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    linear = scale @ np.array([[cos, -sin], [sin, cos]])
    # From the middle of a pixel of the result to that of a pixel of the picture, both counted from the corner's middle.
    middle = np.array([width * (0.5 + shift[0]) - 0.5, height * (0.5 + shift[1]) - 0.5])
    source = np.array([(columns.start + columns.stop - 1) / 2, (rows.start + rows.stop - 1) / 2])
    matrix = np.column_stack([linear, source - linear @ middle])
    return _cv.warpAffine(picture, matrix, (width, height), flags=_cv.INTER_LINEAR | _cv.WARP_INVERSE_MAP)


def brightness(picture: Picture, factor: float) -> Picture:
    """All levels times `factor`."""
    return _cv.addWeighted(picture, factor, picture, 0.0, 0.0)


def contrast(picture: Picture, factor: float) -> Picture:
    """The levels' distances from the mean grey level times `factor`."""
    mean = _cv.mean(_cv.cvtColor(picture, _cv.COLOR_RGB2GRAY))[0]
    return _cv.addWeighted(picture, factor, picture, 0.0, (1.0 - factor) * mean)


def saturation(picture: Picture, factor: float) -> Picture:
    """The levels' distances from their pixel's grey level times `factor`."""
    grey = _cv.cvtColor(_cv.cvtColor(picture, _cv.COLOR_RGB2GRAY), _cv.COLOR_GRAY2RGB)
    return _cv.addWeighted(picture, factor, grey, 1.0 - factor, 0.0)


def hue(picture: Picture, turns: float) -> Picture:
    """The hues `turns` of the whole circle on, in 256ths of it."""
    hsv = _cv.cvtColor(picture, _cv.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(turns * 256) % 256)
    return _cv.cvtColor(hsv, _cv.COLOR_HSV2RGB_FULL)


_SMOOTHING = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def sharpness(picture: Picture, factor: float) -> Picture:
    """The levels' distances from those of a smoothed picture times `factor`; the outermost pixels as they are."""
    smooth = _cv.filter2D(picture, -1, _SMOOTHING)
    smooth[[0, -1]], smooth[:, [0, -1]] = picture[[0, -1]], picture[:, [0, -1]]
    return _cv.addWeighted(picture, factor, smooth, 1.0 - factor, 0.0)


def blur(picture: Picture, sigma: float) -> Picture:
    """Convolved with a Gaussian of `sigma` pixels, cut off at three of them."""
    return _cv.GaussianBlur(picture, (0, 0), sigma)


def cut_out(picture: Picture, box: Box) -> Picture:
    """Black inside `box`."""
    picture = picture.copy()
    picture[box.pixels(*picture.shape[:2])] = 0
    return picture


OPERATIONS: dict[str, Callable[[Picture, float], Picture]] = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
    "sharpness": sharpness,
    "blur": blur,
}
"""Those that take one number."""
