"""What a low limit of open files costs, and what a batch costs on its way from a worker to the main process.

    python benchmarks/few_files.py [--repeats 3]

64 lanes read 64 files of their own (h264 180x320, GOP 2, one process, one thread): all of them open, and with a limit
that leaves room for 8. Then batches of 32 with 3 cameras of 224x224 come from a worker: in the program's parcels, and
by torch's own sharing through /dev/shm. Turns are interleaved.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from support.datasets import write_dataset
from support.program import machine, mixture_of
from torch.utils.data import DataLoader, IterableDataset

from opentau_train.data.decode.open_files import SPARE_FILES
from opentau_train.data.load.stream import training_batches
from opentau_train.data.load.workers import one_pass
from opentau_train.data.mixture.mixture import Mixture

LANES, KEPT, BATCH = 64, 8, 16


class Batches(IterableDataset):
    """Batches that cost nothing to make."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        pictures = torch.randint(0, 255, (32, 1, 3, 224, 224), dtype=torch.uint8)
        for _ in range(20):
            yield {**{f"camera{c}": pictures.clone() for c in range(3)}, **{f"n{i}": torch.ones(32) for i in range(12)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"{machine()}; medians of {repeats} interleaved turns\n")
    with tempfile.TemporaryDirectory() as folder:
        root = write_dataset(Path(folder) / "set", [60] * LANES, cameras=1, episodes_per_file=1)
        mixture = mixture_of(root, "data.num_workers=0", "data.image_size=[96,96]")
        limits = {f"all {LANES} files open": 4096, f"{KEPT} files open": num_open() + SPARE_FILES + KEPT}
        print_table("CPU ms a window", {k: lambda v=v: cpu_a_window(mixture, v) for k, v in limits.items()}, repeats)
    turns = {
        "torch's sharing": lambda: milliseconds(DataLoader(Batches(), batch_size=None, num_workers=1)),
        "parcels": lambda: milliseconds(one_pass(Batches(), 1, 2)),
    }
    print_table("ms of the main process's CPU a batch", turns, repeats)


def print_table(unit: str, turns: dict, repeats: int) -> None:
    measured = [[turn() for turn in turns.values()] for _ in range(repeats)]
    print(f"| | {unit} | to the first |\n|---|---|---|")
    for i, name in enumerate(turns):
        ratio = statistics.median(row[i] / row[0] for row in measured)
        print(f"| {name} | {statistics.median(row[i] for row in measured):.3f} | {ratio:.2f} |")
    print()


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def cpu_a_window(mixture: Mixture, limit: int, steps: int = 40) -> float:
    """Milliseconds of CPU that a window of the stream costs, once all lanes are open, under a limit of open files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        given = {"rank": 0, "size": 1, "first_step": 0, "last_step": 1000, "quarantine": Path(os.devnull)}
        with closing(training_batches(mixture, mixture.tape(BATCH), **given)) as stream:
            for _ in range(LANES // BATCH):
                next(stream)
            started = time.process_time()
            for _ in range(steps):
                next(stream)
            return 1000 * (time.process_time() - started) / (steps * BATCH)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def milliseconds(batches) -> float:
    """Milliseconds of this process's CPU for each batch after the first few, whose pictures are all copied."""
    num, started = 0, 0.0
    for number, batch in enumerate(batches):
        if number == 4:
            started = time.process_time()
        for name in ("camera0", "camera1", "camera2"):
            batch[name].clone()
        num = number - 3
    return 1000 * (time.process_time() - started) / num


if __name__ == "__main__":
    main()
