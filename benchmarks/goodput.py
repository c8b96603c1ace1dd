"""Useful time over wall-clock of a run that is killed again and again and resumed at once.

    python benchmarks/goodput.py --minutes 8                        # a mean time between kills of 2, 5 and 10 minutes
    python benchmarks/goodput.py --mtbf 2 --ranks 1 --minutes 3 --seed 1
    python benchmarks/goodput.py --out FOLDER                       # goes on where an earlier call has stopped

A small policy trains through torchrun. After a time with an exponential distribution a random victim gets SIGKILL: a
rank, a loader worker, torchrun's agent or all processes; when the launch is gone it is started again with resume=auto.
Where the time went is read from the rows of metrics.jsonl and metrics.superseded.jsonl (`time`, `Timing/Step`,
`Timing/Save`) and from launches.jsonl, in which this script notes when it started, killed and saw the end:

- useful: between rows of steps that the newest checkpoint has, saves apart;
- lost: the same of steps that a later attempt makes again, and the time since the last row when the kill came;
- detection: from the kill until no process of the launch is left;
- restart: from the launch to the begin of its first step, or to a kill before it;
- saves: what `Timing/Save` says that they stopped training for.

Beside it: J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
Computer Systems 22 (2006): with a mean time M between kills, saves of d seconds every t seconds of work and restarts of
R, a run takes M exp(R/M) (exp((t + d)/M) - 1) / t seconds for each of work; and J. W. Young's optimum t = sqrt(2 d M),
"A first order approximation to the optimum checkpoint interval", CACM 17 (1974).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kill_campaign import CONFIG
from support.processes import descendants, kill, victims, wait_gone
from support.program import machine

from opentau_train.checkpoints import commit

MINUTE = 60.0
ENDLESS = ["trainer.steps=10000000", "data.num_workers=1", "validation.every=0", "trainer.ema_decay=null"]
SPLIT = ("useful", "lost", "detection", "restart", "saves")


@dataclass
class Figures:
    """Seconds of each part of `SPLIT`, and what a formula needs."""

    seconds: Counter = field(default_factory=Counter)
    kills: Counter = field(default_factory=Counter)
    restarts: list[float] = field(default_factory=list)
    detections: dict[str, list[float]] = field(default_factory=dict)
    saves: list[float] = field(default_factory=list)
    hangs: int = 0

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())


def launch(run_dir: Path, number: int, *, mtbf: float, ranks: int, seed: int, left: float, every: int) -> None:
    """Start or resume the run, kill it after a while, and note in launches.jsonl what was done and when.

    A launch that isn't killed within the `left` seconds gets SIGTERM then, and saves.
    """
    draw = random.Random(f"{seed}-{number}")
    gap = draw.expovariate(1 / mtbf)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "opentau_train", *CONFIG, *ENDLESS, "resume=auto"]
    command += [f"paths.run_dir={run_dir}", f"checkpoint.every={every}"]
    note: dict[str, Any] = {"start": time.time()}
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "launches.log").open("a") as log:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        process.wait(min(gap, left))
        raise RuntimeError(f"the run ended by itself with code {process.returncode}: see {run_dir / 'launches.log'}")
    except subprocess.TimeoutExpired:
        everybody = descendants(process.pid)
    except BaseException:
        # Broad, and raised again: whatever ends the waiting, an interrupt too, no process of the run is left.
        kill([process.pid, *descendants(process.pid)])
        raise
    note["stop"] = time.time()
    if gap < left:
        kinds = victims(process.pid, ranks)
        note["victim"] = draw.choice(list(kinds))
        chosen = kinds[note["victim"]]
        kill(chosen if note["victim"] == "all" else [draw.choice(chosen)])
    else:
        process.send_signal(signal.SIGTERM)
    note["hang"] = not wait_gone(process, everybody, 2 * MINUTE)
    note["gone"] = time.time()
    with (run_dir / "launches.jsonl").open("a") as file:
        file.write(json.dumps(note) + "\n")


def rows_of(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [row for line in lines if line.endswith("\n") and "Timing/Step" in (row := json.loads(line))]


def figures(run_dir: Path) -> Figures:
    """Where the time of the run's launches went."""
    found, newest = Figures(), commit.newest(run_dir / "checkpoints")
    kept = rows_of(run_dir / "metrics.jsonl")
    made = kept + rows_of(run_dir / "metrics.superseded.jsonl")
    useful = {row["time"] for row in kept if newest is not None and row["step"] <= int(newest.name)}
    for note in map(json.loads, (run_dir / "launches.jsonl").read_text().splitlines()):
        rows = sorted((r for r in made if note["start"] < r["time"] < note["stop"]), key=lambda row: row["time"])
        begun = rows[0]["time"] - rows[0]["Timing/Step"] if rows else note["stop"]
        found.seconds["restart"] += begun - note["start"]
        found.restarts += [begun - note["start"]] if rows else []
        for row in rows:
            save = row.get("Timing/Save", 0.0)
            found.saves += [save] if save else []
            found.seconds["saves"] += save
            found.seconds["useful" if row["time"] in useful else "lost"] += row["time"] - begun - save
            begun = row["time"]
        if "victim" not in note:
            continue  # it was told to save and end: the cut step counts nowhere
        found.hangs += note["hang"]
        found.kills[note["victim"]] += 1
        found.seconds["lost"] += note["stop"] - begun
        found.seconds["detection"] += note["gone"] - note["stop"]
        found.detections.setdefault(note["victim"], []).append(note["gone"] - note["stop"])
    return found


def daly(mtbf: float, interval: float, save: float, restart: float) -> float:
    """Share of useful time: `interval` seconds of work between saves of `save` seconds, `restart` after each kill."""
    return interval / (mtbf * math.exp(restart / mtbf) * math.expm1((interval + save) / mtbf))


def row(found: Figures, mtbf: float, ranks: int) -> str:
    """A row of the table."""
    shares = " | ".join(f"{found.seconds[part] / found.wall:.1%}" for part in SPLIT)
    kills = ", ".join(f"{num} {kind}" for kind, num in sorted(found.kills.items())) or "none"
    head = f"| {mtbf / MINUTE:g} | {ranks} | {found.wall / MINUTE:.1f} | {kills} | {shares} |"
    if not (found.saves and found.restarts and found.kills):
        return f"{head} too few kills or saves | | |"
    save, restart = statistics.mean(found.saves), statistics.mean(found.restarts)
    interval = (found.seconds["useful"] + found.seconds["lost"]) / len(found.saves)
    num = sum(found.kills.values())
    gap, lost = found.wall / num, restart + found.seconds["detection"] / num
    best = math.sqrt(2 * save * mtbf)
    came, meant, young = (daly(m, t, save, lost) for m, t in ((gap, interval), (mtbf, interval), (mtbf, best)))
    return f"{head} {came:.1%} at {gap / MINUTE:.1f} min | {meant:.1%} | {young:.1%} at {best:.0f} s |"


def details(found: Figures) -> str:
    """Seconds of restarts, detections and saves."""
    said = [f"restart to first step {statistics.median(found.restarts):.1f} s"] if found.restarts else []
    said += [f"gone after a killed {k} {statistics.median(v):.1f} s" for k, v in sorted(found.detections.items())]
    said += [f"a save {statistics.median(found.saves):.3f} s"] if found.saves else []
    return f"  medians: {', '.join(said)}; {found.hangs} launches outlived a kill by two minutes"


def measure(run_dir: Path, mtbf: float, options: argparse.Namespace) -> Figures:
    """Launch and kill until the minutes are over, those of earlier calls among them."""
    notes = run_dir / "launches.jsonl"
    while True:
        past = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        left = options.minutes * MINUTE - sum(note["gone"] - note["start"] for note in past)
        if left < 1:
            return figures(run_dir)
        chosen = {"mtbf": mtbf, "ranks": options.ranks, "seed": options.seed, "every": options.every}
        launch(run_dir, len(past), left=left, **chosen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="wall-clock of each row")
    parser.add_argument("--mtbf", type=float, nargs="+", default=[2, 5, 10], help="minutes between kills, on average")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--out", type=Path, help="keep the runs here, and go on with those that are there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="goodput_") as folder:
        print(f"{machine()}; a checkpoint every {options.every} steps, seed {options.seed}\n")
        print(
            f"| MTBF, min | ranks | minutes | kills | {' | '.join(SPLIT)} | by Daly, the gap that came "
            "| by Daly, the MTBF | at Young's interval |"
        )
        print("|" + "---|" * (len(SPLIT) + 7))
        for mtbf in options.mtbf:
            run_dir = (options.out or Path(folder)) / f"mtbf{mtbf:g}_ranks{options.ranks}_seed{options.seed}"
            try:
                found = measure(run_dir, mtbf * MINUTE, options)
            except KeyboardInterrupt:
                if (run_dir / "launches.jsonl").exists():
                    print(row(figures(run_dir), mtbf * MINUTE, options.ranks), "(stopped early)")
                return 130
            print(row(found, mtbf * MINUTE, options.ranks), details(found), f"  {machine()}", sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
