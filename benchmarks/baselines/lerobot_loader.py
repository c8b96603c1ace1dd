"""LeRobot's own datasets, read at random: baselines in an environment of their own.

    PYTHON benchmarks/baselines/lerobot_loader.py map|streaming ROOT CHUNK_LENGTH FPS

`map` is LeRobotDataset with indices drawn at random, as its shuffled DataLoader draws them; `streaming` is
StreamingLeRobotDataset with its defaults (a buffer of 1,000 frames). Prints `KIND SECONDS CPU` from opening the dataset
to the first 32 samples, imports left out; then answers each line `N` of its input with the CPU milliseconds a sample
that the next N samples took. One thread; the decoder is LeRobot's default, which keeps its files open. A streaming
dataset's buffer is full when the clock starts.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.streaming_dataset import StreamingLeRobotDataset

BATCH, BUFFER = 32, 1000


def main() -> None:
    torch.set_num_threads(1)
    kind, root, chunk, fps = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    started, cpu = time.perf_counter(), time.process_time()
    samples = shuffled(root, chunk, fps) if kind == "map" else streamed(root, chunk, fps)
    for _ in range(BATCH):
        next(samples)
    print(f"{kind} {time.perf_counter() - started:.3f} {time.process_time() - cpu:.3f}", flush=True)
    for _ in range(2 * BATCH if kind == "map" else BATCH):  # files are open, and a buffer is full
        next(samples)
    for line in sys.stdin:
        num, started = int(line), time.process_time()
        for _ in range(num):
            next(samples)
        print(1e3 * (time.process_time() - started) / num, flush=True)


def shuffled(root: str, chunk: int, fps: float) -> Iterator[dict]:
    """Samples of random indices."""
    times = {"action": [i / fps for i in range(chunk)]}
    dataset = LeRobotDataset("benchmark/set", root=root, delta_timestamps=times, tolerance_s=1e-3)
    draws = random.Random(0)
    while True:
        yield dataset[draws.randrange(len(dataset))]


def streamed(root: str, chunk: int, fps: float) -> Iterator[dict]:
    """Samples of a shuffled stream, again and again."""
    cameras = LeRobotDatasetMetadata("benchmark/set", root=root).video_keys
    times = {"action": [i / fps for i in range(chunk)]} | {key: [0.0] for key in cameras}
    dataset = StreamingLeRobotDataset(
        "benchmark/set", root=root, delta_timestamps=times, tolerance_s=1e-3, buffer_size=BUFFER
    )
    while True:
        yield from dataset


if __name__ == "__main__":
    main()
