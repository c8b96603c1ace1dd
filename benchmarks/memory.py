"""What a data worker holds: with 1,000 and with 1,000,000 episodes, and over 1,000 steps.

    python benchmarks/memory.py [--steps 1000] [--repeats 3]

The episodes are synthetic metadata over eight real ones of one camera 180x320. Each case is a new process with two
workers, batches of 32, 4 lanes a sample (64 lanes a worker); USS (memory that only the process has) of the larger one.
The growth counts from step 2,500 on: at step 1,875 the smaller case ends its first epoch and all its lanes change
episodes at once, the most that a worker holds at a time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support.datasets import write_dataset
from support.program import machine, mixture_of, unique_bytes, with_episodes

from opentau_train.data.load.stream import training_batches

BATCH = 32
CASES = (1_000, 1_000_000)
WARM = 2500
"""Steps after which a worker has held the most that it ever holds at a time, see above."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(run(options.root, options.case, options.steps)))
        return
    print(f"{machine()}; USS of a worker in MB, medians of {options.repeats} runs\n")
    marks = marks_of(options.steps)
    print(f"| episodes | {' | '.join(f'step {m}' for m in marks)} | growth from {WARM} on | first batch |")
    print("|---|" + "---|" * (len(marks) + 2))
    found: dict[int, list[dict]] = {num: [] for num in CASES}
    with tempfile.TemporaryDirectory() as folder:
        root = write_dataset(Path(folder) / "set", [60] * 8, cameras=1)
        for _ in range(options.repeats):
            for num in CASES:
                found[num].append(in_own_process(root, num, options.steps))
    for num, runs in found.items():
        sizes = [statistics.median(run["bytes"][str(m)] for run in runs) / 2**20 for m in marks]
        growth = statistics.median(run["bytes"][str(marks[-1])] / run["bytes"][str(WARM)] for run in runs) - 1
        cells = " | ".join(f"{size:.1f}" for size in sizes)
        print(f"| {num:,} | {cells} | {growth:+.1%} | {statistics.median(run['first'] for run in runs):.2f} s |")
    few, many = (statistics.median(run["bytes"][str(marks[-1])] for run in found[num]) for num in CASES)
    print(f"\na worker of {CASES[1]:,} episodes holds {many / few - 1:+.1%} against {CASES[0]:,}")


def in_own_process(root: Path, num: int, steps: int) -> dict:
    command = [sys.executable, __file__, "--case", str(num), "--root", str(root), "--steps", str(steps)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def marks_of(steps: int) -> list[int]:
    return [WARM // 5, WARM, WARM + steps // 2, WARM + steps]


def run(root: Path, num: int, steps: int) -> dict:
    """Train-loop's view: USS of the larger worker by step, seconds to the first batch."""
    mixture = with_episodes(mixture_of(root), num)
    tape = mixture.tape(BATCH)
    started, first, sizes = time.perf_counter(), 0.0, {}
    batches = training_batches(
        mixture,
        tape,
        rank=0,
        size=1,
        first_step=0,
        last_step=WARM + steps + 8,
        quarantine=root.parent / "quarantine.jsonl",
    )
    for step, _ in enumerate(batches, start=1):
        first = first or time.perf_counter() - started
        if step in marks_of(steps):
            sizes[step] = max(unique_bytes(child.pid) for child in multiprocessing.active_children())
    return {"bytes": sizes, "first": first}


if __name__ == "__main__":
    main()
