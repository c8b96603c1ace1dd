"""What the cameras saw in an episode: as mp4, as GIF, and as a strip of a few moments."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opentau_train.data.builtin.video import X264, Camera, write_video

HEIGHT = 128
"""Pixels that pictures are enlarged to, at least, by a whole number."""
MOMENTS, WIDTH = 8, 160
"""Of a strip: columns, and the pixels of their width."""
GIF_RATE = 20
"""Frames a second that a GIF has at most: viewers show faster ones slowly."""


@dataclass(frozen=True)
class Film:
    """`episode` of an environment: the files' content, and the `strip` [H, W, 3] uint8."""

    episode: int
    mp4: bytes = field(repr=False)
    gif: bytes = field(repr=False)
    strip: NDArray[np.uint8] = field(repr=False)


def film(episode: int, moments: Sequence[Mapping[str, NDArray[np.uint8]]], fps: float) -> Film | None:
    """The film of what the cameras saw, side by side, at each moment of an episode; None where there are no cameras."""
    if not moments[0]:
        return None
    frames = [_beside(moment) for moment in moments]
    chosen = np.unique(np.linspace(0, len(frames) - 1, MOMENTS).round().astype(int))
    strip = np.concatenate([_column(moments[i]) for i in chosen], axis=1)
    every = max(1, round(fps / GIF_RATE))
    gif, pictures = io.BytesIO(), [Image.fromarray(frame) for frame in (*frames[::every], frames[-1])]
    pictures[0].save(gif, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 * every / fps), loop=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_video(path, Camera("libx264", frames[0].shape[:2], options=X264), round(fps), enumerate(frames))
        return Film(episode, path.read_bytes(), gif.getvalue(), strip)


def _column(moment: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The cameras' pictures below each other."""
    sizes = [(WIDTH, max(1, round(WIDTH * p.shape[0] / p.shape[1]))) for p in moment.values()]
    return np.concatenate(
        [np.asarray(Image.fromarray(p).resize(size)) for p, size in zip(moment.values(), sizes, strict=True)]
    )


def _beside(moment: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The cameras' pictures side by side on black, their sizes even, as the codec needs them."""
    pictures = list(moment.values())
    tall = max(picture.shape[0] for picture in pictures)
    zoom = -(-HEIGHT // tall)
    padded = [np.pad(p, ((0, tall - p.shape[0]), (0, 0), (0, 0))) for p in pictures]
    beside = np.concatenate(padded, axis=1).repeat(zoom, 0).repeat(zoom, 1)
    return np.pad(beside, ((0, beside.shape[0] % 2), (0, beside.shape[1] % 2), (0, 0)))
