"""LeRobot's own map-style dataset, read at random: a baseline in an environment of its own.

    PYTHON benchmarks/baselines/lerobot_loader.py ROOT CHUNK_LENGTH FPS

Answers each line `N` of its input with the CPU milliseconds a sample that N random samples took. One thread; the
decoder is LeRobot's default, which keeps its files open.
"""

from __future__ import annotations

import random
import sys
import time

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def main() -> None:
    torch.set_num_threads(1)
    root, chunk, fps = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    times = {"action": [i / fps for i in range(chunk)]}
    dataset = LeRobotDataset("benchmark/set", root=root, delta_timestamps=times, tolerance_s=1e-3)
    draws = random.Random(0)
    for episode in range(dataset.num_episodes):  # open the files before the clock starts
        _ = dataset[int(dataset.meta.episodes[episode]["dataset_from_index"])]
    print(dataset.video_backend, flush=True)
    for line in sys.stdin:
        num, started = int(line), time.process_time()
        for _ in range(num):
            _ = dataset[draws.randrange(len(dataset))]
        print(1e3 * (time.process_time() - started) / num, flush=True)


if __name__ == "__main__":
    main()
