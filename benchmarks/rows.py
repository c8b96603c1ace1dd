"""CPU microseconds a sample of data without video: the stream's batches against plain numpy over rows in memory.

    python benchmarks/rows.py [--repeats 5] [--batches 200]

One process builds the batches of the tape with its defaults (4 lanes a sample, chunks of 16 steps), as a worker does:
windows read from parquet, normalised, padded, stacked. `slices` cuts the same windows out of arrays that are in memory,
one by one, and stacks them; `gather` takes them by one index a batch; neither reads, normalises or names anything.
`first` counts from an empty cache, the beginnings of all lanes included; `steady` the batches after.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from support.datasets import write_dataset
from support.program import machine, mixture_of

from opentau_train.data.load.stream import ShardDataset, TrainPlan
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.tape import Tape

DATASETS = {"20 x 200": [200] * 20, "1,000 x 300": [300] * 1000}
BATCHES = (32, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="a few batches, to see that it runs")
    options = parser.parse_args()
    repeats, batches = (1, 4) if options.quick else (options.repeats, options.batches)
    print(f"{machine()}; us of CPU a sample, medians (means) of {repeats} interleaved turns, {batches} batches each\n")
    print("| episodes x rows | batch | first | steady | steady, wall | slices | gather | steady / slices |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, lengths in DATASETS.items():
            root = write_dataset(Path(folder) / f"episodes{len(lengths)}", lengths, cameras=0, episodes_per_file=50)
            mixture = mixture_of(root)
            for batch in BATCHES:
                print(row(name, mixture, batch, repeats, batches), flush=True)


def row(name: str, mixture: Mixture, batch: int, repeats: int, batches: int) -> str:
    """A line of the table."""
    tape = mixture.tape(batch)
    tape.batch(0)
    baseline = Baseline(mixture, tape, batches)
    columns: dict[str, list[float]] = {name: [] for name in ("first", "steady", "wall", "slices", "gather")}
    for _ in range(repeats):
        stream = shards(mixture, tape, 2 * batches)
        columns["first"].append(spent(partial(take, stream, batches))[0] / (batch * batches))
        cpu, wall = spent(partial(take, stream, batches))
        columns["steady"].append(cpu / (batch * batches))
        columns["wall"].append(wall / (batch * batches))
        for way in ("slices", "gather"):
            columns[way].append(spent(getattr(baseline, way))[0] / (batch * batches))
    cells = [f"{1e6 * statistics.median(c):.1f} ({1e6 * statistics.mean(c):.1f})" for c in columns.values()]
    ratio = statistics.median(columns["steady"]) / statistics.median(columns["slices"])
    return f"| {name} | {batch} | {' | '.join(cells)} | {ratio:.2f} |"


def shards(mixture: Mixture, tape: Tape, batches: int) -> Iterator[object]:
    return iter(ShardDataset(mixture, TrainPlan(tape, 0, 1, 0, batches), train=True))


def take(stream: Iterator[object], num: int) -> None:
    for _ in range(num):
        next(stream)


def spent(call: Callable[[], None]) -> tuple[float, float]:
    """(CPU seconds, seconds) of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


class Baseline:
    """The same windows, cut by numpy out of rows that are in memory; only whole chunks, so that nothing is padded."""

    def __init__(self, mixture: Mixture, tape: Tape, batches: int):
        (dataset,) = mixture.datasets
        self.num = dataset.chunk_length
        rows = sorted(dataset.source.columns(np.arange(len(dataset.source.episodes))), key=lambda r: r[0])
        self.episodes = [(state, actions) for _, state, actions in rows]
        self.state, self.actions = (np.concatenate(part) for part in zip(*self.episodes, strict=True))
        length = dataset.source.episodes.length
        self.start = np.cumsum(length) - length
        windows = [tape.batch(step) for step in range(batches, 2 * batches)]
        self.batches = [(w.episode, np.minimum(w.frame, length[w.episode] - self.num)) for w in windows]

    def slices(self) -> None:
        for episodes, frames in self.batches:
            cut = [(self.episodes[e], f) for e, f in zip(episodes.tolist(), frames.tolist(), strict=True)]
            torch.from_numpy(np.stack([state[f] for (state, _), f in cut]))
            torch.from_numpy(np.stack([actions[f : f + self.num] for (_, actions), f in cut]))

    def gather(self) -> None:
        steps = np.arange(self.num)
        for episodes, frames in self.batches:
            place = self.start[episodes] + frames
            torch.from_numpy(self.state[place])
            torch.from_numpy(self.actions[place[:, None] + steps])


if __name__ == "__main__":
    main()
