"""Whether a run's processes grow: their own memory, main process and workers, over 2,000 steps.

    python benchmarks/growth.py [--steps 2000]

A small policy on the built-in DROID sample (three cameras of video), two workers, a row each ten steps, a validation
and a checkpoint each 250: what a run does again and again. The run is started as a user starts it and looked at from
outside. Counted are anonymous pages (what a process has written, pages that it still shares with the one that forked
it among them: else it would seem to grow whenever that one writes), from the step on after which two epochs are over:
all lanes have changed episodes by then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support.program import machine

WARM = 1100
"""Steps of 8 of an epoch's 4,203 windows: two epochs."""
MARKS = 4
CONFIG = [
    "+recipe=droid_policy",
    "model.width=32",
    "model.depth=1",
    "model.heads=2",
    "data.image_size=[32,32]",
    "data.num_workers=2",
    "trainer.global_batch_size=8",
    "trainer.device=cpu",
    "checkpoint.every=250",
    "checkpoint.keep_last=2",
    "validation.every=250",
    "validation.max_samples_per_group=16",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help=f"after the first {WARM} (2000)")
    options = parser.parse_args()
    marks = [WARM + options.steps * mark // MARKS for mark in range(MARKS + 1)]
    with tempfile.TemporaryDirectory() as folder:
        sizes = sizes_at(Path(folder) / "run", Path(folder) / "cache", marks)
    print(f"{machine()}; MiB of anonymous memory\n")
    print(f"| process | {' | '.join(f'step {step:,}' for step in sizes)} | growth |")
    print(f"|{'---|' * (len(sizes) + 2)}")
    for number, name in enumerate(("main", "workers")):
        column = [found[number] / 2**20 for found in sizes.values()]
        print(f"| {name} | {' | '.join(f'{size:.1f}' for size in column)} | {column[-1] - column[0]:+.1f} |")


def sizes_at(run_dir: Path, cache: Path, marks: list[int]) -> dict[int, tuple[int, int]]:
    """{step: anonymous bytes of (the main process, all its workers)} soon after each of `marks`."""
    arguments = [*CONFIG, f"trainer.steps={marks[-1] + 40}", f"paths.run_dir={run_dir}", f"paths.cache_dir={cache}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found: dict[int, tuple[int, int]] = {}
    with (run_dir.parent / "output").open("w+") as output:
        command = [sys.executable, "-m", "opentau_train", *arguments]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            while process.poll() is None and len(found) < len(marks):
                time.sleep(0.2)
                step = newest_step(run_dir / "metrics.jsonl")
                if step >= marks[len(found)]:
                    workers = workers_of(process.pid)
                    found[step] = anonymous(process.pid), sum(map(anonymous, workers))
            process.wait()
        finally:
            process.kill()
        if process.returncode or len(found) < len(marks):
            sys.exit(Path(output.name).read_text())
    return found


def anonymous(pid: int) -> int:
    """Bytes of the process's pages that lie in no file."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous:"))


def newest_step(metrics: Path) -> int:
    """The last step that has a row; 0 where there is none yet."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def workers_of(pid: int) -> list[int]:
    """The run's loader workers, those that validation keeps among them."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listed.split()]


if __name__ == "__main__":
    main()
