"""Short films of episodes, and stills of them, small enough to stand in a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opentau_train.data.mixture.mixture import Dataset
from opentau_train.errors import BadSample
from opentau_train.types import WindowSpec

SIZE = (144, 192)
"""(H, W) that pictures fit into."""
NUM_FRAMES, NUM_STILLS = 24, 5
FRAME_MS = 125


@dataclass(frozen=True)
class Film:
    """One camera of one episode: `clip`, an animated WebP of frames evenly over it, and `stills`, a WebP of some of
    them side by side."""

    camera: str
    clip: bytes
    stills: bytes


@dataclass(frozen=True)
class Episode:
    """An episode as it is shown: its number, its rows, its task, its films, and the cause where it can't be read."""

    number: int
    length: int
    task: str
    films: tuple[Film, ...]
    cause: str = ""


def films(dataset: Dataset, positions: Sequence[int]) -> list[Episode]:
    """The episodes at `positions` of the dataset's table; decodes `NUM_FRAMES` frames of each camera of each."""
    table, made = dataset.source.episodes, []
    factory = dataset.source.cursors(WindowSpec(chunk_length=1, image_size=SIZE))
    with closing(factory):
        for position in positions:
            number, length = int(table.episode_index[position]), int(table.length[position])
            frames = np.unique(np.linspace(0, length - 1, min(NUM_FRAMES, length)).round().astype(int))
            pictures: dict[str, list[NDArray[np.uint8]]] = {}
            with closing(factory.cursor()) as cursor:
                try:
                    for frame in frames.tolist():
                        window = cursor.read(position, frame)
                        for camera, images in window.images.items():
                            pictures.setdefault(camera, []).append(images[-1])
                except BadSample as error:
                    made.append(Episode(number, length, "", (), error.cause))
                    continue
            shown = tuple(Film(camera, _clip(own), _stills(own)) for camera, own in pictures.items())
            made.append(Episode(number, length, window.prompts[0] if window.prompts else "", shown))
    return made


def _clip(pictures: Sequence[NDArray[np.uint8]]) -> bytes:
    first, *rest = (Image.fromarray(picture) for picture in pictures)
    options = {"save_all": True, "append_images": rest, "duration": FRAME_MS, "loop": 0} if rest else {}
    return _webp(first, quality=60, method=2, **options)


def _stills(pictures: Sequence[NDArray[np.uint8]]) -> bytes:
    chosen = np.linspace(0, len(pictures) - 1, min(NUM_STILLS, len(pictures))).round().astype(int)
    return _webp(Image.fromarray(np.concatenate([pictures[i] for i in chosen], axis=1)), quality=70)


def _webp(image: Image.Image, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, "WEBP", **options)
    return content.getvalue()
