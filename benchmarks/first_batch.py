"""Seconds from asking for the first batch to having it: ordinary files, and one video file of 150,000 frames.

    python benchmarks/first_batch.py [--repeats 3]

Each start is a new process whose two workers open all they need; the operating system has the files in its cache. Rank
0 of a launch would wait as long. Writes the files first (about 300 MB of h264 480x640, and 64x64 pictures).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from support.datasets import Repeated, write_dataset
from support.program import machine, mixture_of

from opentau_train.data.load.stream import training_batches

CASES = {
    "local files of a few hundred MB": "large",
    "a file of 150,000 frames": "long",
}
LARGE = {"preset": "ultrafast", "crf": "8", "bf": "0", "threads": "2"}
TINY = {"preset": "ultrafast", "crf": "30", "bf": "0", "threads": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, help="keep the datasets there, and use them again")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start is not None:
        print(start(options.start))
        return
    print(f"{machine()}; batch 32, 4 lanes a sample, 2 workers, medians of {options.repeats} starts\n")
    print("| dataset | MB | video files | frames a file | seconds | CPU seconds |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            print_case(name, write(case, (options.data or Path(folder)) / case), options.repeats)


def write(case: str, root: Path) -> Path:
    rng = np.random.default_rng(0)
    if case == "long":
        pictures = [rng.integers(0, 255, (4, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1) for _ in range(64)]
        frames = Repeated(pictures, 150_000)
        return write_dataset(
            root, [300] * 500, size=(64, 64), cameras=1, options=TINY, episodes_per_file=500, frames=frames
        )
    pictures = [rng.integers(0, 255, (480, 640, 3), np.uint8) for _ in range(8)]
    frames = Repeated(pictures, 360)
    return write_dataset(root, [90] * 16, size=(480, 640), cameras=1, options=LARGE, frames=frames)


def print_case(name: str, root: Path, repeats: int) -> None:
    files = sorted(root.rglob("*.mp4"))
    for path in files:
        path.read_bytes()
    found = []
    for _ in range(repeats):
        command = [sys.executable, __file__, "--start", str(root)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found.append([float(x) for x in done.stdout.split()[-2:]])
    seconds, cpu = (statistics.median(column) for column in zip(*found, strict=True))
    megabytes = sum(path.stat().st_size for path in files) / 2**20
    frames = {"large": 360, "long": 150_000}[root.name]
    print(f"| {name} | {megabytes:.0f} | {len(files)} | {frames:,} | {seconds:.2f} | {cpu:.2f} |", flush=True)


def start(root: Path) -> str:
    """Seconds on the clock, and of all processes' CPU, until the first batch is there."""
    mixture = mixture_of(root)
    tape = mixture.tape(32)
    clock, cpu = time.perf_counter(), os.times()
    batches = training_batches(
        mixture, tape, rank=0, size=1, first_step=0, last_step=1, quarantine=root.parent / "quarantine.jsonl"
    )
    next(batches)
    seconds = time.perf_counter() - clock
    for _ in batches:  # the workers end, so that their time is counted
        pass
    spent = os.times()
    return f"{seconds} {sum(spent[i] - cpu[i] for i in range(4))}"


if __name__ == "__main__":
    main()
