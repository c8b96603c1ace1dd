"""What a start costs: `--help`, checking a configuration, and a whole run of two steps, beside torch's own import.

    python benchmarks/start.py [--repeats 5]

Each row is a new process, in interleaved turns: CPU seconds and seconds by the clock. *torch* imports it and nothing
else; *torch, one step* also takes one step of AdamW, for which torch imports its compiler, and saves by
torch.distributed.checkpoint: what any program pays that trains and writes sharded checkpoints.
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

from support.program import machine

DATA = Path(__file__).parent.parent / "tests" / "data" / "lerobot_v30"
ONE_STEP = """
import sys, torch, torch.distributed.checkpoint as checkpoint
layer = torch.nn.Linear(8, 8)
optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
layer(torch.ones(1, 8)).sum().backward()
optimizer.step()
checkpoint.save(layer.state_dict(), checkpoint_id=sys.argv[1], no_dist=True)
"""
RUN = [
    "+recipe=lerobot",
    f"data.sources.main.root={DATA}",
    "data.sources.main.val_split_ratio=0.3",
    "data.num_workers=0",
    "data.image_size=[32,32]",
    "trainer.steps=2",
    "trainer.global_batch_size=4",
    "scheduler.warmup_steps=1",
    "model.width=32",
    "model.depth=1",
    "model.heads=2",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    program = ["-m", "opentau_train"]
    rows = {
        "torch": ["-c", "import torch"],
        "torch, one step": ["-c", ONE_STEP, "{folder}/checkpoint"],
        "--help": [*program, "--help"],
        "--cfg job": [*program, *RUN, "--cfg", "job"],
        "two steps": [*program, *RUN, "paths.run_dir={folder}/run", "paths.cache_dir={folder}/cache"],
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for turn in range(1 + options.repeats):
        for name, arguments in rows.items():
            found = spent(arguments)
            times[name] += [found] if turn else []  # the first reads what isn't in memory yet
    print(f"{machine()}; {options.repeats} interleaved turns, medians (means)\n")
    print("| | CPU s | s by the clock | CPU over *torch, one step* |\n|---|---|---|---|")
    base = statistics.median(cpu for cpu, _ in times["torch, one step"])
    for name, found in times.items():
        cells = [f"{statistics.median(c):.2f} ({statistics.mean(c):.2f})" for c in zip(*found, strict=True)]
        print(f"| {name} | {' | '.join(cells)} | {statistics.median(cpu for cpu, _ in found) / base:.2f} |")


def spent(arguments: list[str]) -> tuple[float, float]:
    """(CPU seconds, seconds) of a process of this interpreter and all that it starts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(argument.replace("{folder}", folder) for argument in arguments)]
        before, started = os.times(), time.perf_counter()
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        wall, after = time.perf_counter() - started, os.times()
    if done.returncode:
        sys.exit(done.stderr)
    return sum(after[2:4]) - sum(before[2:4]), wall


if __name__ == "__main__":
    main()
