"""Milliseconds that a row of thousands of groups holds up the training thread, sink by sink.

    python benchmarks/log_rows.py [--repeats 5] [--groups 3000]

A row while training has two losses a group; a row of a validation three numbers each (mean, N, standard error), of
groups and of norm heads. `baseline` is TensorBoard's own `add_scalar` a number. What a thread of the sink does beside
the training is waited for between the rows and stands under `beside`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from support.program import machine
from torch.utils.tensorboard import SummaryWriter

from opentau_train.sinks.base import Sink, SinkContext
from opentau_train.sinks.jsonl import JsonlSink
from opentau_train.sinks.tensorboard import TensorBoardSink


class Plain(Sink):
    """The baseline: a call for each number."""

    def __init__(self, *, context: SinkContext):
        self.writer = SummaryWriter(str(context.run_dir / "plain"))

    def write(self, step, row):
        for tag, value in row.items():
            self.writer.add_scalar(tag, value, step)

    def close(self):
        self.writer.close()


SINKS = {"tensorboard": TensorBoardSink, "jsonl": JsonlSink, "baseline": Plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--groups", type=int, default=3000)
    parser.add_argument("--quick", action="store_true", help="few groups, to see that it runs")
    options = parser.parse_args()
    repeats, num = (1, 30) if options.quick else (options.repeats, options.groups)
    names = [f"dataset{i // 3}/{('joint', 'ee', 'mixed')[i % 3]}" for i in range(num)]
    heads = [f"robot{i}::joint" for i in range(num)]
    rows = {
        "training": {f"Training/{name}/{term}": i / 7 for i, name in enumerate(names) for term in ("MSE", "CE")},
        "validation": {
            f"Validation/{name}/{term}{end}": i / 7
            for i, name in enumerate([*names, *heads])
            for term in ("MSE", "CE")
            for end in ("", "/N", "/StdErr")
        },
    }
    print(f"{machine()}; {num:,} groups, medians (means) of {repeats} interleaved rows\n")
    print("| sink | row | numbers | CPU ms of the training thread | wall ms | beside, CPU ms |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        context = SinkContext(Path(folder), "run", 100, 0, {})
        sinks = {name: kind(context=context) for name, kind in SINKS.items()}
        found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for step in range(1, repeats + 1):
            for kind, row in rows.items():
                for name, sink in sinks.items():
                    found.setdefault((name, kind), []).append(spent(sink, step, row))
        for sink in sinks.values():
            sink.close()
    for (name, kind), times in found.items():
        cells = [f"{statistics.median(c):.1f} ({statistics.mean(c):.1f})" for c in zip(*times, strict=True)]
        print(f"| {name} | {kind} | {len(rows[kind]):,} | {' | '.join(cells)} |")


def spent(sink: Sink, step: int, row: dict[str, float]) -> tuple[float, float, float]:
    """Milliseconds of a row: (CPU of this thread, wall, CPU of other threads until it is written)."""
    own, all_of_it, wall = time.thread_time(), time.process_time(), time.perf_counter()
    sink.write(step, row)
    times = time.thread_time() - own, time.perf_counter() - wall
    sink.flush()
    total, later = time.process_time() - all_of_it, time.thread_time() - own
    return 1e3 * times[0], 1e3 * times[1], 1e3 * (total - later)


if __name__ == "__main__":
    main()
