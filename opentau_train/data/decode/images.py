"""Pixels: from decoded video frames and encoded still images to RGB arrays of one size."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from opentau_train.data.decode.fit import fit
from opentau_train.strangers import MALFORMED, MAX_PIXELS

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
"""What Pillow may read: others start programs (EPS: Ghostscript) or are hardly looked after."""


_OF_PLUGINS = (RuntimeError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow's plugins raise of damaged files besides."""


class ImageError(Exception):
    """A still image can't be decoded; the text says why."""


class DepthError(ImageError):
    """An image's values are no colours: depth in 16 bits or in floating point numbers, of which 8 bits tell nothing."""


class Resizer:
    """Brings frames to the largest RGB picture inside `size` (H, W) that keeps their aspect ratio, or their own size,
    by the filter `scaling` (`data.scaling`).

    Holds libswscale's context, whose set-up costs more than scaling a small frame: keep one a camera.
    """

    def __init__(self, size: tuple[int, int] | None, scaling: str = "bilinear"):
        self.size, self._filter = size, Interpolation[scaling.upper()]
        self._reformatter = VideoReformatter()
        self._source = self._fitted = (0, 0)

    def __call__(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """The frame as [H', W', 3] uint8 RGB."""
        return next(self.all(iter([frame]), 1))

    def all(self, frames: Iterator[av.VideoFrame], num: int) -> Iterator[NDArray[np.uint8]]:
        """Each of the frames, at most `num`, as [H', W', 3] uint8 RGB. They share one block of
        memory, which lives as long as any of them: pictures that are allocated between the decoder's own buffers leave
        gaps that a heap doesn't fill again."""
        block = np.empty((0, 0, 0, 3), np.uint8)
        for left, frame in zip(range(num, 0, -1), frames):
            height, width = self._fit(frame)
            if not len(block) or block.shape[1:3] != (height, width):
                block = np.empty((left, height, width, 3), np.uint8)
            # threads=1: libswscale would start a pool of its own in every worker.
            scaled = self._reformatter.reformat(frame, width, height, "rgb24", interpolation=self._filter, threads=1)
            plane: Any = scaled.planes[0]  # a buffer, which its stub doesn't say
            rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
            block[0].reshape(height, 3 * width)[:] = rows[:, : 3 * width]
            yield block[0]
            block = block[1:]

    def _fit(self, frame: av.VideoFrame) -> tuple[int, int]:
        source = frame.height, frame.width
        if source != self._source:
            self._source, self._fitted = source, source if self.size is None else fit(*source, self.size)
        return self._fitted


def decode_image(encoded: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """[H, W, 3] uint8 RGB of a file of one of `FORMATS`; grey images repeat their channel. One of more than
    `max_pixels` is refused before anything is decoded.

    Raises `ImageError`, a `DepthError` for values that aren't 8-bit colours.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is this function's own
            opened = Image.open(io.BytesIO(encoded), formats=FORMATS)
        with opened as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"it has {image.width} x {image.height} pixels, more than data.max_pixels")
            return _to_rgb(image)
    except ImageError:
        raise
    except (UnidentifiedImageError, *MALFORMED, *_OF_PLUGINS) as error:
        raise ImageError(str(error)) from error


def _to_rgb(image: Any) -> NDArray[np.uint8]:
    if image.mode.startswith(("I", "F")):
        bits = "floating point numbers" if image.mode == "F" else "16 bits or more"
        raise DepthError(f"its pixels are {bits}, a depth and no picture")
    return np.array(image.convert("RGB"))
