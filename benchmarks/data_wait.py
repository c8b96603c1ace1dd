"""How long a step waits for its data: real runs on 1, 2, 4 and 8 ranks, without and with two loader workers each.

    python benchmarks/data_wait.py [--ranks 1 2 4 8] [--workers 0 2] [--steps 40] [--repeats 3]

`flow_tiny`, narrower, on the built-in DROID sample (three cameras), 4 samples a rank, started by torchrun as a user
does; each process on one thread. Milliseconds of rank 0's steps from the rows of metrics.jsonl, the first quarter left
out: medians over the repeats of the mean over a run. `tools.plan --read` says what to expect of a machine: what reading
takes of one of this one's cores stands below the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from support.program import machine

CONFIG = [
    "+recipe=droid_policy",
    "model.width=64",
    "model.depth=2",
    "data.image_size=[48,80]",
    "trainer.log_every=1",
    "scheduler.warmup_steps=2",
    "validation=none",
    "checkpoint.every=0",
    "trainer.device=cpu",
]
SAMPLES = 4
"""Of a rank."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"{machine()}; ms a step, medians of {options.repeats} runs of {options.steps} steps\n")
    print("| ranks | workers a rank | step | waits for data | share | samples/s |\n|---|---|---|---|---|---|")
    cases = [(ranks, workers) for ranks in options.ranks for workers in options.workers]
    found: dict[tuple[int, int], list[tuple[float, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.repeats):
            for ranks, workers in cases:
                run_dir = Path(folder) / f"{ranks}_{workers}_{turn}"
                waits = waited(run_dir, Path(folder) / "cache", ranks, workers, options.steps)
                found[ranks, workers].append(waits)
        for (ranks, workers), runs in found.items():
            step, wait = (statistics.median(column) for column in zip(*runs, strict=True))
            cells = (
                ranks,
                workers,
                f"{step:.0f}",
                f"{wait:.1f}",
                f"{wait / step:.1%}",
                f"{1e3 * ranks * SAMPLES / step:.0f}",
            )
            print(f"| {' | '.join(map(str, cells))} |")
        print(f"\n{reading(Path(folder) / 'cache')}")


def waited(run_dir: Path, cache: Path, ranks: int, workers: int, steps: int) -> tuple[float, float]:
    """Milliseconds of a step, and of its wait for data, on average."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = [
        *CONFIG,
        f"data.num_workers={workers}",
        f"trainer.global_batch_size={SAMPLES * ranks}",
        f"trainer.steps={steps}",
        f"paths.run_dir={run_dir}",
        f"paths.cache_dir={cache}",
    ]
    command = [*launcher, "-m", "opentau_train", *arguments]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "Timing/Step" in row and row["step"] > steps // 4]
    return tuple(1e3 * statistics.mean(row[f"Timing/{name}"] for row in rows) for name in ("Step", "DataWait"))  # type: ignore[return-value]


def reading(cache: Path) -> str:
    """What `tools.plan --read` says of the same data."""
    command = [sys.executable, "-m", "opentau_train.tools.plan", *CONFIG, f"paths.cache_dir={cache}", "--read", "512"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return next(line for line in done.stdout.splitlines() if line.startswith("reading"))


if __name__ == "__main__":
    main()
