"""What decoding without the codec's loop filter saves, and what it costs: `data.skip_loop_filter`.

    python benchmarks/loop_filter.py [--repeats 5] [--quick]

Pictures with the 1/f spectrum of natural scenes, panned slowly, in videos without reordered frames, read in order by
the program's own reader with and without the filter, in turns; CPU milliseconds a frame, medians. PSNR in dB of the
frames at their own size, against the pictures that were recorded; where it falls most, at the end of a group of
pictures, since each frame is predicted from one that lacks the filter; and of both decodings against each other.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from support.datasets import H264, natural, psnr
from support.program import machine, turns

from opentau_train.data.builtin.video import Camera, write_video
from opentau_train.data.decode.decoding import Decoding
from opentau_train.data.decode.images import Resizer
from opentau_train.data.decode.video import VideoPool

CASES = (("libx264", (180, 320)), ("libx264", (480, 640)), ("libx265", (180, 320)))
GOPS = (2, 30, 120)
FRAMES, FPS = 120, 15


def main() -> None:
    repeats, quick = turns(__doc__)
    print(f"{machine()}; ms of CPU a frame: medians of {repeats}; PSNR in dB\n")
    print("| codec | frame | GOP | ms | without | ratio | PSNR | without | at a group's end | of both |")
    print(f"|{'---|' * 10}")
    for codec, size in CASES[:1] if quick else CASES:
        for gop in GOPS[:1] if quick else GOPS:
            cells = row(codec, size, gop, repeats)
            print(f"| {codec[3:]} | {size[0]} x {size[1]} | {gop} | {' | '.join(cells)} |", flush=True)


def row(codec: str, size: tuple[int, int], gop: int, repeats: int) -> list[str]:
    pictures = list(natural(FRAMES, size, 0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        options = {**H264, "keyint_min": str(gop)} | ({"x265-params": "log-level=error"} if codec == "libx265" else {})
        write_video(path, Camera(codec, size, gop, options, 1), FPS, enumerate(pictures))
        turns = [[read(path, skip) for skip in (False, True)] for _ in range(repeats)]
    whole, less = (statistics.median(turn[kind][0] for turn in turns) for kind in (0, 1))
    (_, plain), (_, skipped) = turns[0]
    last = slice(gop - 1, None, gop)
    quality = psnr(plain, pictures), psnr(skipped, pictures), psnr(skipped[last], pictures[last]), psnr(plain, skipped)
    return [f"{whole:.3f}", f"{less:.3f}", f"{less / whole:.2f}", *(f"{q:.1f}" for q in quality)]


def read(path: Path, skip: bool) -> tuple[float, list[NDArray[np.uint8]]]:
    """(CPU milliseconds a frame, the frames)"""
    pool, resizer = VideoPool(decoding=Decoding(skip_loop_filter=skip)), Resizer(None)
    cursor = pool.cursor()
    started = time.process_time()
    frames = [cursor.read(path, i / FPS, 1e-3) for i in range(FRAMES)]
    taken = 1e3 * (time.process_time() - started) / FRAMES
    pool.close()
    return taken, [resizer(frame).copy() for frame in frames]


if __name__ == "__main__":
    main()
