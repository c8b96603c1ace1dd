"""Kill -9 at random moments, resume, and compare with a run that was never killed.

    python benchmarks/kill_campaign.py                  # 56 kills: 1 and 2 ranks, saving at once and in the background
    python benchmarks/kill_campaign.py --kills 8 --seed 1

A run is killed during steps, saves and validations, all its ranks or one of them at a time, and started again with
resume=auto until it ends. After every kill the newest checkpoint must be whole and never older than the one before;
`last` must point to a whole one. In the end parameters, moments, average and every logged number must be bit-equal to
those of the uninterrupted run. Exit code 0 if so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from opentau_train.checkpoints import commit

REPO = Path(__file__).parent.parent
DATA = REPO / "tests" / "data"
VALIDATE_EVERY = 5
MINUTE = 60.0

CONFIG = [
    "+recipe=lerobot",
    f"data.sources.main.root={DATA / 'lerobot_v30'}",
    "data.sources.main.val_split_ratio=0.3",
    "data.num_workers=0",
    "data.image_size=[32,32]",
    "model.width=32",
    "model.depth=1",
    "model.heads=2",
    "model.max_prompt_bytes=8",
    "trainer.global_batch_size=4",
    "trainer.log_every=1",
    "trainer.ema_decay=0.9",
    "scheduler.warmup_steps=2",
    "checkpoint.every=3",
    "checkpoint.keep_last=2",
    f"validation.every={VALIDATE_EVERY}",
    "validation.max_samples_per_group=8",
    "logger=none",
]
"""A policy whose steps take milliseconds, on a dataset of the tests."""

OF_THE_PROCESS = (
    "attempt",
    *("time", "Timing/", "Memory/", "Training/SamplesPerSecond", "Training/TokensPerSecond"),
    *("Training/OpenDecoders", "Training/DecoderMemory"),
)
"""Starts of the logged numbers that say how the process fares, not how the training goes."""

VARIANTS: dict[str, tuple[int, list[str]]] = {
    "1 rank": (1, []),
    "1 rank, async": (1, ["checkpoint.async=true"]),
    "2 ranks": (2, []),
    "2 ranks sharded, async": (2, ["parallelism=fsdp", "checkpoint.async=true"]),
}


@dataclass
class Report:
    """What a campaign did: kills by (phase, how many ranks), rounds it took, the longest end of the surviving ranks."""

    kills: Counter = field(default_factory=Counter)
    rounds: int = 0
    slowest_end: float = 0.0


def campaign(folder: Path, *, kills: int, seed: int, ranks: int, overrides: Sequence[str], steps: int = 40) -> Report:
    """At least `kills` kills, over as many runs of `steps` steps as that takes. Raises AssertionError where a promise
    is broken."""
    draw, report = random.Random(seed), Report()
    arguments = [*CONFIG, f"trainer.steps={steps}", *overrides]
    start(arguments, folder / "whole", ranks).communicate()
    expected = everything(folder / "whole")
    while sum(report.kills.values()) < kills:
        run_dir = folder / f"round_{report.rounds}"
        while killed_once(arguments, run_dir, ranks, draw, report):
            if sum(report.kills.values()) >= kills:
                done = start([*arguments, "resume=auto"], run_dir, ranks)
                output, _ = done.communicate()
                assert done.returncode == 0, output
                break
        report.rounds += 1
        found = everything(run_dir)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        differ = [name for name, value in expected.items() if not equal(value, found[name])]
        assert not differ, f"{run_dir} differs from the uninterrupted run in {differ[:5]}"
    return report


def killed_once(arguments: Sequence[str], run_dir: Path, ranks: int, draw: random.Random, report: Report) -> bool:
    """Start or resume the run and kill it at a random moment; False when it came to its end before."""
    before = commit.newest(run_dir / "checkpoints")
    process = start([*arguments, "resume=auto"], run_dir, ranks)
    moment = draw.choice([in_step, in_save, in_validation])
    rows = len(read_rows(run_dir)) + draw.randint(1, 5)
    came = wait_until(lambda: len(read_rows(run_dir)) >= rows and moment(run_dir), process)
    time.sleep(draw.random() * 0.1)
    one = ranks > 1 and draw.random() < 0.5
    ended = kill(process, one, draw, report) if came and process.poll() is None else False
    if not ended:
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return False
    phase = next(name for name, holds in PHASES.items() if holds(run_dir))
    report.kills[phase, "one rank" if one else "all"] += 1
    newest = commit.newest(run_dir / "checkpoints")
    last = run_dir / "checkpoints" / "last"
    if before is not None:
        assert newest is not None and int(newest.name) >= int(before.name), (before, newest)
    if last.exists() or newest is not None:
        # Between the rename and the link's move, `last` is the one before: whole too.
        assert newest is not None and (not last.exists() or commit.flaw(last.resolve()) is None), (last, newest)
    return True


def kill(process: subprocess.Popen, one: bool, draw: random.Random, report: Report) -> bool:
    """SIGKILL to all, or to one rank, after which the others must end by themselves. False if it had ended."""
    if one:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if not children:
            return False
        started = time.monotonic()
        os.kill(int(draw.choice(children)), signal.SIGKILL)
        process.communicate(timeout=2 * MINUTE)
        report.slowest_end = max(report.slowest_end, time.monotonic() - started)
        assert report.slowest_end < MINUTE, "the other ranks outlived a killed one by more than a minute"
        assert process.returncode != 0
        return True
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def start(arguments: Sequence[str], run_dir: Path, ranks: int) -> subprocess.Popen:
    launcher = ["-m", "opentau_train"]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *launcher]
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments, f"paths.run_dir={run_dir}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(holds: Callable[[], bool], process: subprocess.Popen) -> bool:
    """False when the process ends before."""
    while process.poll() is None:
        if holds():
            return True
        time.sleep(0.003)
    return False


# -- where a run is, by its files ------------------------------------------------------------------------------------


def in_step(run_dir: Path) -> bool:
    return True


def in_save(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("*.tmp"))


def in_validation(run_dir: Path) -> bool:
    """The last row is the training's of a step that validates: the validation's row hasn't come yet."""
    rows = read_rows(run_dir)
    return bool(rows) and rows[-1]["step"] % VALIDATE_EVERY == 0 and "Training/Loss" in rows[-1]


PHASES = {"save": in_save, "validation": in_validation, "step": in_step}
"""The first that holds after a kill is where it struck."""


def read_rows(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


# -- comparing -------------------------------------------------------------------------------------------------------


def everything(run_dir: Path) -> dict[str, object]:
    """Every tensor and option of the last checkpoint's shards, its weights' file, and every logged number."""
    last = run_dir / "checkpoints" / "last"
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(last / "state", Path(folder, "state.pt"))
        flat = dict(flatten(torch.load(Path(folder, "state.pt"), weights_only=False)))
    flat["model.safetensors"] = (last / "pretrained_model" / "model.safetensors").read_bytes()
    for row in read_rows(run_dir):
        flat |= {f"row {row['step']}: {k}": v for k, v in row.items() if not k.startswith(OF_THE_PROCESS)}
    return flat


def flatten(tree: object, path: str = ""):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{path}.{key}")
    else:
        yield path, tree


def equal(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    return left == right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=56)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    total: Counter = Counter()
    for number, (name, (ranks, overrides)) in enumerate(VARIANTS.items()):
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="kill_campaign_") as folder:
            report = campaign(
                Path(folder),
                kills=-(-options.kills // len(VARIANTS)),
                seed=options.seed * len(VARIANTS) + number,
                ranks=ranks,
                overrides=overrides,
            )
        total += report.kills
        kinds = ", ".join(f"{num} in a {phase} ({who})" for (phase, who), num in sorted(report.kills.items()))
        print(
            f"{name}: {sum(report.kills.values())} kills, {report.rounds} runs, {time.monotonic() - began:.0f} s: "
            f"{kinds}; slowest end of surviving ranks {report.slowest_end:.1f} s",
            flush=True,
        )
    print(f"{sum(total.values())} kills; every run ended bit-equal to its uninterrupted one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
