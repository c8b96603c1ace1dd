"""What pictures are worth when a decoder's frame is brought to size: libswscale's filters, their error and their time.

    python benchmarks/scaling.py [--repeats 5] [--quick]

Pictures with the 1/f spectrum of natural scenes and edges (a grid of lines, text-like), as yuv420p, brought to the size
and to RGB in one call as the reader does it. The reference is the frame converted to RGB at its own size and averaged
over each output pixel's area in float64, which no filter does exactly. PSNR in dB over all pictures; CPU milliseconds a
picture on one thread, medians of interleaved turns. `Pillow` is its box filter on the converted frame.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image
from support.datasets import natural, psnr
from support.program import machine, turns

from opentau_train.data.decode.fit import fit

CASES = (((180, 320), (96, 96)), ((480, 640), (224, 224)), ((720, 1280), (224, 224)))
"""(a frame's size, the largest size of its picture), (H, W)."""
FILTERS = ("FAST_BILINEAR", "BILINEAR", "AREA", "BICUBIC", "LANCZOS")
PICTURES = 12


def main() -> None:
    repeats, _ = turns(__doc__)
    print(f"{machine()}; PSNR in dB, ms of CPU a picture: medians of {repeats}\n")
    print("| frame | picture | filter | PSNR, scenes | PSNR, lines | ms |\n|---|---|---|---|---|---|")
    for size, inside in CASES:
        target = fit(*size, inside)
        for cells in rows(size, target, repeats):
            print(
                f"| {' x '.join(map(str, size))} | {' x '.join(map(str, target))} | {' | '.join(cells)} |", flush=True
            )


def rows(size: tuple[int, int], target: tuple[int, int], repeats: int) -> list[list[str]]:
    """The cells of each filter."""
    kinds = [list(map(coded, pictures)) for pictures in (natural(PICTURES, size, 0), lines(size))]
    wanted = [[area(frame.to_ndarray(format="rgb24"), target) for frame in frames] for frames in kinds]
    ways: dict[str, Callable[[av.VideoFrame], np.ndarray]] = {name.lower(): scaled(name, target) for name in FILTERS}
    ways["Pillow"] = lambda frame: np.asarray(frame.to_image().resize(target[::-1], Image.Resampling.BOX))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.process_time()
            for frame in kinds[0]:
                way(frame)
            times[name].append(1e3 * (time.process_time() - started) / len(kinds[0]))
    found = []
    for name, way in ways.items():
        qualities = [psnr([way(frame) for frame in frames], exact) for frames, exact in zip(kinds, wanted, strict=True)]
        found.append([name, *(f"{quality:.1f}" for quality in qualities), f"{statistics.median(times[name]):.3f}"])
    return found


def coded(picture: np.ndarray) -> av.VideoFrame:
    """A decoder's frame of it."""
    return av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")


def lines(size: tuple[int, int]) -> list[np.ndarray]:
    """Thin dark lines at several angles on a light ground: what aliases."""
    y, x = np.mgrid[: size[0], : size[1]]
    angles = np.linspace(0, np.pi / 2, PICTURES)
    waves = [np.cos(a) * x + np.sin(a) * y for a in angles]
    return [np.repeat(np.where(w % 7 < 2, 40, 220).astype(np.uint8)[..., None], 3, axis=2) for w in waves]


def scaled(name: str, target: tuple[int, int]) -> Callable[[av.VideoFrame], np.ndarray]:
    reformatter = VideoReformatter()

    def way(frame: av.VideoFrame) -> np.ndarray:
        height, width = target
        how = Interpolation[name]
        return reformatter.reformat(frame, width, height, "rgb24", interpolation=how, threads=1).to_ndarray()

    return way


def area(picture: np.ndarray, target: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] float64: the mean over each output pixel's area."""
    rows, columns = (weights(old, new) for old, new in zip(picture.shape[:2], target, strict=True))
    return np.einsum("hy,yxc,wx->hwc", rows, picture.astype(np.float64), columns, optimize=True)


def weights(old: int, new: int) -> np.ndarray:
    """[new, old]: the share of each old pixel in each new one."""
    edges = np.arange(new + 1) * old / new
    begin, end = edges[:-1, None], edges[1:, None]
    covered = np.minimum(end, np.arange(1, old + 1)) - np.maximum(begin, np.arange(old))
    return covered.clip(0) * new / old


if __name__ == "__main__":
    main()
