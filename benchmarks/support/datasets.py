"""Small LeRobot datasets with the codecs, keyframe distances and file sizes that a benchmark asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.builtin.video import Camera, write_video
from opentau_train.data.builtin.writer import Episode, Feature, Layout, write_tables

H264 = {"preset": "veryfast", "crf": "26", "bf": "0", "threads": "1"}
AV1 = {"preset": "10", "crf": "30", "svtav1-params": "lp=1"}
FPS = 15


MARGIN, CONTRAST, GRAIN = 16, 12.0, 2.0
"""Pixels that a scene is wider than the picture; deviations of the scene and of the sensor's noise, of 255."""


def natural(num: int, size: tuple[int, int], seed: int) -> Iterable[NDArray[np.uint8]]:
    """`num` pictures [H, W, 3] of a slow pan over a texture whose amplitude falls as 1/frequency, as that of natural
    scenes does (Field 1987, "Relations between the statistics of natural images..."), under a sensor's grain.

    `CONTRAST` is set so that AV1 takes about 3.5 KB a 180x320 frame: v3.0 files of DROID hold 500 MB and some 150,000
    frames. Flat pictures would decode several times faster than any camera's.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    spread = (height + 2 * MARGIN, width + 2 * MARGIN)
    frequency = np.hypot(np.fft.fftfreq(spread[0])[:, None], np.fft.fftfreq(spread[1])[None])
    frequency[0, 0] = 1.0
    layers = [np.fft.ifft2(np.fft.fft2(rng.normal(size=spread)) / frequency).real for _ in range(2)]
    light, hue = (layer / layer.std() for layer in layers)
    scene = 128 + CONTRAST * np.stack([light + 0.2 * hue, light, light - 0.2 * hue], axis=-1).astype(np.float32)
    grain = rng.normal(0.0, GRAIN, (8, height, width, 3)).astype(np.float32)
    for i in range(num):
        top, left = MARGIN * (1 + 0.9 * np.sin(i / 17 + seed)), MARGIN * (1 + 0.9 * np.cos(i / 23))
        (y, x), (dy, dx) = (int(top), int(left)), (top % 1, left % 1)
        part = scene[y : y + height + 1, x : x + width + 1]
        rows = (1 - dy) * part[:-1] + dy * part[1:]
        yield np.clip((1 - dx) * rows[:, :-1] + dx * rows[:, 1:] + grain[i % 8], 0, 255).astype(np.uint8)


def psnr(pictures: list[NDArray[np.uint8]], exact: list[NDArray[np.uint8]]) -> float:
    """In dB, over all pixels of all pictures; infinite where they are the same."""
    error = np.mean([np.mean((a.astype(np.float64) - b) ** 2) for a, b in zip(pictures, exact, strict=True)])
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


class Repeated:
    """`num` pictures, the same few again and again; may be gone through many times."""

    def __init__(self, pictures: list, num: int):
        self.pictures, self.num = pictures, num

    def __iter__(self):
        return (self.pictures[i % len(self.pictures)] for i in range(self.num))


def write_dataset(
    root: Path,
    lengths: Sequence[int],
    *,
    size: tuple[int, int] = (180, 320),
    cameras: int = 2,
    codec: str = "libx264",
    gop: int = 2,
    options: Mapping[str, str] = H264,
    episodes_per_file: int = 4,
    frames: Iterable[NDArray[np.uint8]] | None = None,
) -> Path:
    """Write episodes of `lengths` frames, or find them written; `frames` are those of every video file, by default
    natural ones."""
    if (root / "meta" / "info.json").is_file():
        return root
    rng = np.random.default_rng(0)
    camera = Camera(codec, size, gop, {**options, "keyint_min": str(gop)}, episodes_per_file)
    features = {name: Feature("float32", (7,)) for name in ("observation.state", "action")}
    videos = {f"observation.images.cam{c}": camera for c in range(cameras)}
    layout = Layout(features, videos, FPS, "arm", 16)
    rows = [rng.normal(size=(n, 7)).cumsum(0).astype(np.float32) for n in lengths]
    episodes = [Episode("move", n, dict.fromkeys(features, r)) for n, r in zip(lengths, rows, strict=True)]
    for start in range(0, len(lengths), episodes_per_file):
        total = sum(lengths[start : start + episodes_per_file])
        for c, name in enumerate(videos):
            path = root / layout.path(start // episodes_per_file, name)
            pictures = natural(total, size, 100 * start + c) if frames is None else frames
            write_video(path, camera, FPS, enumerate(pictures))
    write_tables(root, layout, episodes)
    return root
