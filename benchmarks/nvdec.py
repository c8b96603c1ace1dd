"""Decoding on the card's NVDEC against the CPU: `data.video_decoder`.

    python benchmarks/nvdec.py [--repeats 5] [--quick]

Pictures with the 1/f spectrum of natural scenes, panned slowly, keyframes 30 frames apart, read by the program's own
cursors, several at a time as a worker's lanes are, and brought to 224x224; in turns. Milliseconds a frame by the clock
and of the CPU, medians. *opened* is how long a decoder takes to give its first picture, *memory* what one takes on the
card. Without a card only the CPU's columns are there.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from support.datasets import H264, natural
from support.program import machine, turns

from opentau_train.data.builtin.video import Camera, write_video
from opentau_train.data.decode.decoding import Decoding
from opentau_train.data.decode.images import Resizer
from opentau_train.data.decode.video import BURST, VideoPool

SIZES = ((180, 320), (480, 640), (720, 1280), (1080, 1920))
CODECS = {"libx264": H264, "libsvtav1": {"preset": "10", "crf": "35"}}
FRAMES, FPS, GOP, CURSORS = 96, 15, 30, 8


def main() -> None:
    repeats, quick = turns(__doc__)
    card = ask_card("name")
    decoders = ("cpu", "nvdec") if card else ("cpu",)
    print(f"{machine()}, {card or 'no card'}; medians of {repeats}; {CURSORS} cursors\n")
    print("| codec | frame | decoder | ms | ms of CPU | opened | memory |")
    print(f"|{'---|' * 7}", flush=True)
    for codec, options in list(CODECS.items())[: 1 if quick else None]:
        for size in SIZES[: 1 if quick else None]:
            for cells in rows(codec, options, size, decoders, repeats):
                print(f"| {codec[3:]} | {size[0]} x {size[1]} | {' | '.join(cells)} |", flush=True)


def rows(
    codec: str, options: dict[str, str], size: tuple[int, int], decoders: tuple[str, ...], repeats: int
) -> list[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, Camera(codec, size, GOP, options, 1), FPS, enumerate(natural(FRAMES, size, 0)))
        taken = [[read(path, decoder) for decoder in decoders] for _ in range(1 + repeats)][1:]  # the first warms up
    cells = []
    for i, decoder in enumerate(decoders):
        wall, cpu, opened, memory = (statistics.median(column) for column in zip(*(turn[i] for turn in taken)))
        cells.append([decoder, f"{wall:.2f}", f"{cpu:.2f}", f"{1e3 * opened:.0f} ms", f"{memory / 2**20:.0f} MiB"])
    return cells


def read(path: Path, decoder: str) -> tuple[float, float, float, float]:
    """(milliseconds a frame by the clock, of the CPU, seconds to open one decoder, bytes of the card it takes)"""
    pool, resizer = VideoPool(decoding=Decoding(video_decoder=decoder)), Resizer((224, 224), "area")
    free, started = free_bytes(decoder), time.perf_counter()
    cursors = [pool.cursor() for _ in range(CURSORS)]
    for cursor in cursors:
        resizer(cursor.read(path, 0.0, 1e-3))
    opened, memory = (time.perf_counter() - started) / CURSORS, (free - free_bytes(decoder)) / CURSORS
    clock, cpu = time.perf_counter(), time.process_time()
    for first in range(0, FRAMES, BURST):
        for cursor in cursors:
            for frame in cursor.read_all(path, [i / FPS for i in range(first, first + BURST)], 1e-3):
                resizer(frame)
    per_frame = 1e3 / (FRAMES * CURSORS)
    taken = per_frame * (time.perf_counter() - clock), per_frame * (time.process_time() - cpu)
    for cursor in cursors:
        cursor.close()
    pool.close()
    return *taken, opened, memory


def free_bytes(decoder: str) -> int:
    return 0 if decoder == "cpu" else int(ask_card("memory.free")) * 2**20


def ask_card(what: str) -> str:
    """A property of the first card, "" where there is none. Not by torch, whose context on it decoders can't share."""
    if shutil.which("nvidia-smi") is None:
        return ""
    words = ["nvidia-smi", "--id=0", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
