"""Seconds of the statistics of a dataset's rows, exact quantiles, by 1, 2, ... workers, against pyarrow and numpy.

    python benchmarks/statistics_of_rows.py [--repeats 5] [--rows 1000000] [--workers 1 2 4]

State and actions of 8 dimensions each, episodes of 300 rows, 500 a file. `numpy` reads a column of all files at once
and takes mean, deviation, extremes and the two quantiles; the program computes what a training does, without its cache:
it reads parts of the dataset on threads, checks that each row is the episode's, and joins the parts in their order.

From the seconds of one worker and of the most follows which share of the work is serial (Amdahl), and from both what
27,000,000 rows take on 8 cores; both by the least seconds of the turns, as a busy machine adds to them.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from support.program import machine, settings_of

from opentau_train.config.settings import Settings
from opentau_train.data.builtin.writer import Episode, Feature, Layout, write_tables
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.mixture.normalize import HeadStats
from opentau_train.data.mixture.open import open_plan
from opentau_train.data.mixture.statistics import compute
from opentau_train.data.mixture.team import Team, own_cores

NAMES, DIMS, LENGTH = ("observation.state", "action"), 8, 300
ROWS, CORES = 27_000_000, 8
"""What the arithmetic is for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, nargs="+", help="by default 1, 2, 4, ..., and all cores")
    parser.add_argument("--quick", action="store_true", help="few rows, to see that it runs")
    options = parser.parse_args()
    repeats, rows = (1, 3_000) if options.quick else (options.repeats, options.rows)
    cores = len(own_cores())
    workers = sorted({*(options.workers or [*(2**k for k in range(cores.bit_length())), cores])})
    print(f"{machine()}; medians (means) of {repeats} interleaved turns\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "rows"
        write(root, rows // LENGTH)
        words = ["+recipe=lerobot", f"data.sources.main.root={root}", "data.sources.main.val_split_ratio=0"]
        settings = settings_of(words)
        plan = open_plan(settings, settings.data.sources)
        ways = {"numpy": partial(of_numpy, root), "reading alone": partial(read, plan)}
        ways |= {f"{n} worker{'s' * (n > 1)}": partial(of_program, plan, settings, n) for n in workers}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                found[name].append(spent(way))
    print(f"| {rows // LENGTH * LENGTH:,} rows x {2 * DIMS} | CPU s | wall s | CPU / numpy |\n|---|---|---|---|")
    numpy = statistics.median(cpu for cpu, _ in found["numpy"])
    for name, times in found.items():
        (cpu, _), cells = map(statistics.median, zip(*times, strict=True)), [shown(t) for t in zip(*times, strict=True)]
        print(f"| {name} | {' | '.join(cells)} | {cpu / numpy:.2f} |")
    fastest = [min(wall for _, wall in found[name]) for name in list(ways)[2:]]
    if workers[0] == 1 and len(workers) > 1:
        one, most, num = fastest[0], fastest[-1], workers[-1]
        serial = min(1.0, max(0.0, (num * most / one - 1) / (num - 1)))
        seconds = one / (rows // LENGTH * LENGTH) * ROWS * (serial + (1 - serial) / CORES)
        print(
            f"\nserial: {serial:.0%}, by {num} workers; {ROWS:,} rows on {CORES} cores by arithmetic: {seconds:.1f} s"
        )


def shown(times: tuple[float, ...]) -> str:
    return f"{statistics.median(times):.2f} ({statistics.mean(times):.2f})"


def spent(call: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds of the process, seconds) of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def write(root: Path, episodes: int) -> None:
    rng = np.random.default_rng(0)
    layout = Layout({name: Feature("float32", (DIMS,)) for name in NAMES}, {}, 15, "arm", 500)
    rows = [{name: rng.normal(size=(LENGTH, DIMS)).astype(np.float32) for name in NAMES} for _ in range(episodes)]
    write_tables(root, layout, [Episode("move", LENGTH, columns) for columns in rows])


def of_program(plan: Mixture, settings: Settings, workers: int) -> dict[str, HeadStats]:
    with tempfile.TemporaryDirectory() as cache:
        paths = dataclasses.replace(settings.paths, cache_dir=cache)
        return compute(dataclasses.replace(settings, paths=paths), plan.datasets, plan.groups, Team(num_cores=workers))


def read(plan: Mixture) -> None:
    source = plan.datasets[0].source
    for _ in source.columns(np.arange(len(source.episodes))):
        pass


def of_numpy(root: Path) -> list[tuple[np.ndarray, ...]]:
    out = []
    for name in NAMES:
        files = [
            pq.read_table(path, columns=[name], use_threads=False)
            for path in sorted((root / "data").rglob("*.parquet"))
        ]
        arrays = [file.column(name).combine_chunks().flatten().to_numpy().reshape(-1, DIMS) for file in files]
        rows = np.concatenate(arrays)
        wide = rows.astype(np.float64)
        extremes = rows.min(0), rows.max(0)
        out.append((wide.mean(0), wide.std(0), *extremes, np.quantile(rows, [0.01, 0.99], axis=0)))
    return out


if __name__ == "__main__":
    main()
