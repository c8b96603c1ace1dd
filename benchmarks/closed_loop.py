"""From demonstrations to a success rate, on five tasks of Meta-World, with pictures and without.

    pip install "opentau_train[metaworld]"
    python benchmarks/closed_loop.py --folder DIR [--tasks reach-v3 ...] [--models flow_tiny act_tiny lerobot_act]
        [--seeds 0 1 2] [--steps 2400] [--ways seeing blind] [--demonstrations 100] [--episodes 100]
        [--env KEY=VALUE ...] [--lerobot PYTHON] [--only-print]

Every piece is a command of the program: demonstrations by the simulator's scripted expert, training by the command
line, the success rate from starts that no demonstration had. *Blind* is the same with black pictures: state and time
tell where the hand is, only pictures tell where it must go. Pieces that are in DIR already aren't made again, so that
the table can be filled in many runs; it is printed for all that DIR holds, of the 60 cells that the whole has.

With `--env env.num_starts=50` demonstrations and episodes share fifty starts, as in Meta-World's own benchmark of one
task; another declaration of the environment wants a folder of its own.

`lerobot_act` is LeRobot's own ACT (baselines/lerobot_act.py), trained by LeRobot in the environment of `--lerobot`
(`make .venv/lerobot/.installed`), from the same files; it plays the same starts in the same loop.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path

from support.program import machine

from opentau_train.simulation.success import wilson

TASKS = ("reach-v3", "push-v3", "drawer-close-v3", "button-press-v3", "door-open-v3")
MODELS = ("flow_tiny", "act_tiny")
WAYS = ("seeing", "blind")
SEEDS = (0, 1, 2)
HORIZON = 4
"""Steps of a chunk that are taken before the next is sampled."""
SIMULATORS = 4
"""At a time: a chunk costs 25 ms of a core in a batch of four, alone 57. More take longer to start than they save."""
BASELINE = Path(__file__).parent / "baselines" / "lerobot_act.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("closed_loop"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--models", nargs="+", default=["flow_tiny"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--demonstrations", type=int, default=100)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--env", nargs="+", default=[], help="changes of the environment: env.num_starts=50 ...")
    parser.add_argument("--lerobot", type=Path, default=Path(".venv/lerobot/bin/python"))
    parser.add_argument("--only-print", action="store_true")
    options = parser.parse_args()
    if not options.only_print:
        fill(options)
    print(f"{machine()}\n")
    print_table(options.folder, options.steps)


def fill(options: argparse.Namespace) -> None:
    """Make what `options.folder` hasn't."""
    if find_spec("metaworld") is None:
        sys.exit('Meta-World isn\'t installed: pip install "opentau_train[metaworld]"')
    changes = [f"env.{change}" for change in options.env]
    for task in options.tasks:
        data = demonstrations(options.folder, task, options.demonstrations, changes)
        for seed in options.seeds:
            for model in options.models:
                for way in options.ways:
                    run = data.parent / "runs" / f"{task}+{model}+{way}+{options.steps}+{seed}"
                    if model == "lerobot_act":
                        lerobot(options, data, run, task, way, seed)
                    else:
                        train(data, run, model, seed, way, options.steps)
                        play(run, task, options.episodes, changes)


def program(*command: str) -> None:
    """Run a command; its output goes to stderr."""
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ}, stdout=sys.stderr)


def demonstrations(folder: Path, task: str, num: int, changes: list[str]) -> Path:
    """The dataset of a task, made once."""
    out = folder / f"{task}-{num}"
    if not out.is_dir():
        words = ["env=metaworld", f"task={task}", f"episodes={num}", f"out={out}", "timeout=3600", *changes]
        program(sys.executable, "-m", "opentau_train.tools.demos", *words)
    return out


def train(data: Path, run: Path, model: str, seed: int, way: str, steps: int) -> None:
    """The run of one cell of the table."""
    settings = ["+recipe=lerobot", f"data.sources.main.root={data}", f"model={model}", f"trainer.steps={steps}"]
    settings += [f"seed={seed}", f"data.blank_images={str(way == 'blind').lower()}", "data.image_size=[64,64]"]
    settings += ["model.ce_weight=0.02"] if model.startswith("flow") else []
    settings += [f"paths.run_dir={run}", "resume=auto", "data.num_workers=1"]
    if not (run / "checkpoints" / f"{steps:08d}" / "run.json").is_file():
        program(sys.executable, "-m", "opentau_train", *settings)


def play(run: Path, task: str, episodes: int, changes: list[str]) -> None:
    """Its success rate, written into the run's directory."""
    out = run / f"success-{episodes}"
    if not (out / "rollout.json").is_file():
        words = [f"checkpoint={run}", "env=metaworld", f"task={task}", f"episodes={episodes}", f"out={out}"]
        words += [f"horizon={HORIZON}", f"simulators={SIMULATORS}", "timeout=3600", *changes]
        program(sys.executable, "-m", "opentau_train.tools.rollout", *words)


def lerobot(options: argparse.Namespace, data: Path, run: Path, task: str, way: str, seed: int) -> None:
    """The cell of LeRobot's ACT: what it trained, and its success rate."""
    python, out = str(options.lerobot.absolute()), run / f"success-{options.episodes}"
    if not options.lerobot.is_file():
        sys.exit(f"{options.lerobot} isn't there: make .venv/lerobot/.installed, or name another with --lerobot")
    blind = ["--blind"] if way == "blind" else []
    if not (run / "cost.json").is_file():
        shutil.rmtree(run, ignore_errors=True)  # it begins again: LeRobot refuses a directory that is there
        sizes = ["--steps", str(options.steps), "--seed", str(seed)]
        program(python, str(BASELINE), "train", str(data), str(run), *sizes, *blind)
    if not (out / "rollout.json").is_file():
        words = ["--set", f"env.task={task}", *(f"env.{change}" for change in options.env)]
        words += ["--episodes", str(options.episodes), "--horizon", str(HORIZON), *blind]
        words += ["--simulators", str(SIMULATORS), "--packages", sysconfig.get_path("purelib")]
        program(python, str(BASELINE), "play", str(run), str(out), *words)


def print_table(folder: Path, steps: int) -> None:
    """A line a task, policy, way and number of steps: the successes of all seeds together, and of each. Says how
    much of the whole with `steps` it is."""
    cells: dict[tuple[str, ...], dict[str, list[bool]]] = {}
    for file in sorted(folder.glob("runs/*/success-*/rollout.json")):
        task, model, way, num_steps, seed = file.parts[-3].split("+")
        outcomes = [episode["success"] for episode in json.loads(file.read_text())["episodes"]]
        cells.setdefault((task, model, way, num_steps), {})[seed] = outcomes
    print("| task | policy | | steps | success | 95 % interval | by seed |\n|---|---|---|---|---|---|---|")
    for cell, seeds in sorted(cells.items(), key=lambda item: order(item[0])):
        reached, num = sum(map(sum, seeds.values())), sum(map(len, seeds.values()))
        low, high = wilson(reached, num)
        each = ", ".join(f"{sum(outcomes)}/{len(outcomes)}" for outcomes in seeds.values())
        print(f"| {' | '.join(cell)} | {reached / num:.0%} | {low:.0%} to {high:.0%} | {each} |")
    whole = {(task, model, way, str(steps)) for task in TASKS for model in MODELS for way in WAYS}
    num = sum(len(seeds) for cell, seeds in cells.items() if cell in whole)
    print(f"\n{num} of {len(whole) * len(SEEDS)} cells: tasks x policies x ways x seeds")


def order(cell: tuple[str, ...]) -> tuple[int, str, bool, int]:
    """Where a line stands: in the order of the tasks, seeing before blind."""
    task, model, way, steps = cell
    return TASKS.index(task) if task in TASKS else len(TASKS), model, way == "blind", int(steps)


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - started:.0f} s")
