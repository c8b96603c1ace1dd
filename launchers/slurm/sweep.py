"""One job of train.sbatch for each combination of values, each with a run directory of its own.

    python launchers/slurm/sweep.py runs/lr --nodes=2 --gpus-per-node=8 -- optimizer.lr=1e-4,3e-4 seed=1,2
    python launchers/slurm/sweep.py runs/lr --dry-run -- 'scheduler.warmup_steps=range(0,300,100)'

Before `--`: the directory of the sweep, then sbatch's options. After it: overrides, with values as in Hydra's sweeps
(`KEY=A,B`, `choice(...)`, `range(...)`; a list in brackets is one value). The environment is train.sbatch's, but for
RUN_DIR. Every job is stopped, saved and queued again by itself. `--dry-run` prints what would be submitted. The
directory's sweep.jsonl gets a line a job: `job`, `run`, `overrides`. Exit code 0, 2 for a mistake, or sbatch's own.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).absolute().with_name("train.sbatch")
"""An absolute path: the job finds its checkout by what it was submitted with."""


def combinations(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job. Raises hydra's OverrideParseException."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    choices: list[list[str]] = []
    for text, parsed in zip(overrides, OverridesParser.create().parse_overrides(overrides)):
        key = text.partition("=")[0]
        sweeps = parsed.is_sweep_override()
        choices.append([f"{key}={value}" for value in parsed.sweep_string_iterator()] if sweeps else [text])
    return [list(chosen) for chosen in itertools.product(*choices)]


def run_name(number: int, chosen: list[str], constant: set[str]) -> str:
    """A directory's name: the job's number and what is its own."""
    own = ",".join(override.lstrip("+") for override in chosen if override not in constant)
    return f"{number:03d}-{own}".replace("/", "_").replace(" ", "")[:150].rstrip("-")


def submit(options: list[str], chosen: list[str], run: Path) -> tuple[int, str]:
    """sbatch's exit code, and the job's number."""
    command = ["sbatch", "--parsable", *options, str(SCRIPT), *chosen]
    done = subprocess.run(command, env={**os.environ, "RUN_DIR": str(run)}, stdout=subprocess.PIPE, text=True)
    return done.returncode, done.stdout.strip().partition(";")[0]


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    at = arguments.index("--") if "--" in arguments else 0
    before, overrides = arguments[:at], arguments[at + 1 :]
    if not before or before[0].startswith("-"):
        what, remedy = "no directory, or no overrides after --", "sweep.py DIRECTORY [SBATCH OPTIONS] -- KEY=A,B"
        print(f"error: {what}\n  remedy: {remedy}", file=sys.stderr)
        return 2
    from hydra.errors import OverrideParseException

    try:
        jobs = combinations(overrides)
    except OverrideParseException as error:
        what = str(error).splitlines()[0]
        print(f"error: {what}\n  where:  {error.override}\n  remedy: write KEY=A,B", file=sys.stderr)
        return 2
    options = [option for option in before[1:] if option != "--dry-run"]
    constant = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    folder = Path(before[0]).absolute()
    for number, chosen in enumerate(jobs):
        run = folder / run_name(number, chosen, constant)
        if "--dry-run" in before:
            print(f"RUN_DIR={shlex.quote(str(run))} {shlex.join(['sbatch', *options, str(SCRIPT), *chosen])}")
            continue
        code, job = submit(options, chosen, run)
        if code:
            return code
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "sweep.jsonl", "a") as lines:
            lines.write(json.dumps({"job": job, "run": str(run), "overrides": chosen}) + "\n")
        print(f"{job}: {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
