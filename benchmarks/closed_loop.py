"""From demonstrations to a success rate, on five tasks of Meta-World, with pictures and without.

    pip install "opentau_train[metaworld]"
    python benchmarks/closed_loop.py --folder DIR [--tasks reach-v3 ...] [--models flow_tiny act_tiny] [--seeds 0 1 2]
        [--steps 2400] [--ways seeing blind] [--demonstrations 100] [--episodes 100]

Every piece is a command of the program: demonstrations by the simulator's scripted expert, training by the command
line, the success rate from starts that no demonstration had. *Blind* is the same with black pictures: state and time
tell where the hand is, only pictures tell where it must go. Pieces that are in DIR already aren't made again, so that
the table can be filled in many runs; it is printed for all that DIR holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from support.program import machine

from opentau_train.simulation.success import wilson

TASKS = ("reach-v3", "push-v3", "drawer-close-v3", "button-press-v3", "door-open-v3")
HORIZON = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("closed_loop"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--models", nargs="+", default=["flow_tiny"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--ways", nargs="+", choices=["seeing", "blind"], default=["seeing", "blind"])
    parser.add_argument("--demonstrations", type=int, default=100)
    parser.add_argument("--episodes", type=int, default=100)
    options = parser.parse_args()
    if find_spec("metaworld") is None:
        sys.exit('Meta-World isn\'t installed: pip install "opentau_train[metaworld]"')
    for task in options.tasks:
        data = demonstrations(options.folder, task, options.demonstrations)
        for model in options.models:
            for seed in options.seeds:
                for way in options.ways:
                    run = trained(data, task, model, seed, way, options.steps)
                    play(run, task, options.episodes)
    print(f"{machine()}\n")
    print_table(options.folder)


def program(module: str, *arguments: str) -> None:
    """Run a module of the program; its output goes to stderr."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, "-m", f"opentau_train{module}", *arguments]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)


def demonstrations(folder: Path, task: str, num: int) -> Path:
    """The dataset of a task, made once."""
    out = folder / f"{task}-{num}"
    if not out.is_dir():
        program(".tools.demos", "env=metaworld", f"task={task}", f"episodes={num}", f"out={out}", "timeout=3600")
    return out


def trained(data: Path, task: str, model: str, seed: int, way: str, steps: int) -> Path:
    """The run of one cell of the table."""
    run = data.parent / "runs" / f"{task}+{model}+{way}+{steps}+{seed}"
    settings = ["+recipe=lerobot", f"data.sources.main.root={data}", f"model={model}", f"trainer.steps={steps}"]
    settings += [f"seed={seed}", f"data.blank_images={str(way == 'blind').lower()}", "data.image_size=[64,64]"]
    settings += ["model.ce_weight=0.02"] if model.startswith("flow") else []
    settings += [f"paths.run_dir={run}", "resume=auto", "data.num_workers=1"]
    if not (run / "checkpoints" / f"{steps:08d}" / "run.json").is_file():
        program("", *settings)
    return run


def play(run: Path, task: str, episodes: int) -> None:
    """Its success rate, written into the run's directory."""
    out = run / f"success-{episodes}"
    if not (out / "rollout.json").is_file():
        words = [f"checkpoint={run}", "env=metaworld", f"task={task}", f"episodes={episodes}", f"out={out}"]
        program(".tools.rollout", *words, f"horizon={HORIZON}", "simulators=2", "timeout=3600")


def print_table(folder: Path) -> None:
    """A line a task, policy, way and number of steps: the successes of all seeds together, and of each."""
    cells: dict[tuple[str, ...], dict[str, list[bool]]] = {}
    for file in sorted(folder.glob("runs/*/success-*/rollout.json")):
        task, model, way, steps, seed = file.parts[-3].split("+")
        outcomes = [episode["success"] for episode in json.loads(file.read_text())["episodes"]]
        cells.setdefault((task, model, way, steps), {})[seed] = outcomes
    print("| task | policy | | steps | success | 95 % interval | by seed |\n|---|---|---|---|---|---|---|")
    for cell, seeds in cells.items():
        reached, num = sum(map(sum, seeds.values())), sum(map(len, seeds.values()))
        low, high = wilson(reached, num)
        each = ", ".join(f"{sum(outcomes)}/{len(outcomes)}" for outcomes in seeds.values())
        print(f"| {' | '.join(cell)} | {reached / num:.0%} | {low:.0%} to {high:.0%} | {each} |")


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - started:.0f} s")
