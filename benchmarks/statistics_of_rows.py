"""CPU seconds of the statistics of a dataset's rows, exact quantiles, against pyarrow and numpy over whole files.

    python benchmarks/statistics_of_rows.py [--repeats 5] [--rows 1000000]

State and actions of 8 dimensions each, episodes of 300 rows, 500 a file. `numpy` reads a column of all files at once
and takes mean, deviation, extremes and the two quantiles; the program reads episodes in the order of the files, checks
that each row is the episode's, and adds in float64 in that order, which is the same whatever the files are cut into.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from support.program import machine, settings_of

from opentau_train.data.builtin.writer import Episode, Feature, Layout, write_tables
from opentau_train.data.mixture import normalize
from opentau_train.data.mixture.open import open_source
from opentau_train.data.source import Source

NAMES, DIMS, LENGTH = ("observation.state", "action"), 8, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="few rows, to see that it runs")
    options = parser.parse_args()
    repeats, rows = (1, 3_000) if options.quick else (options.repeats, options.rows)
    print(f"{machine()}; CPU seconds, medians (means) of {repeats} interleaved turns\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "rows"
        write(root, rows // LENGTH)
        settings = settings_of(["+recipe=lerobot", f"data.sources.main.root={root}"]).data.sources["main"]
        source = open_source("main", settings)
        ways = {
            "program": partial(of_program, source),
            "of it reading": partial(read, source),
            "numpy": partial(of_numpy, root),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                found[name].append(spent(way))
    print(f"| rows x dimensions | {' | '.join(ways)} | program / numpy |")
    print("|---|---|---|---|---|")
    cells = [f"{statistics.median(times):.2f} ({statistics.mean(times):.2f})" for times in found.values()]
    ratio = statistics.median(found["program"]) / statistics.median(found["numpy"])
    print(f"| {rows // LENGTH * LENGTH:,} x {2 * DIMS} | {' | '.join(cells)} | {ratio:.2f} |")


def spent(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def write(root: Path, episodes: int) -> None:
    rng = np.random.default_rng(0)
    layout = Layout({name: Feature("float32", (DIMS,)) for name in NAMES}, {}, 15, "arm", 500)
    rows = [{name: rng.normal(size=(LENGTH, DIMS)).astype(np.float32) for name in NAMES} for _ in range(episodes)]
    write_tables(root, layout, [Episode("move", LENGTH, columns) for columns in rows])


def of_program(source: Source) -> normalize.HeadStats:
    positions = np.arange(len(source.episodes))
    rows = (("main", position, state, [actions]) for position, state, actions in source.columns(positions))
    num = int(source.episodes.length.sum())
    return normalize.compute(rows, num, source.state_names, source.action_names)


def read(source: Source) -> None:
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
