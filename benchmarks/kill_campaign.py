"""Kill -9 at random moments, resume, and compare with a run that was never killed.

    python benchmarks/kill_campaign.py                  # 70 kills: 1 and 2 ranks, saving at once and in the background
    python benchmarks/kill_campaign.py --kills 8 --seed 1
    python benchmarks/kill_campaign.py --kills 500 --only "2 ranks" --only "2 hosts"

A run is killed during steps, saves and validations, and started again with resume=auto until it ends. The victim is a
rank, a loader worker, torchrun's agent, all processes, or, of two hosts (network namespaces; needs root), the
network. After every kill the newest checkpoint must be whole and never older than the one before;
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
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from support.hosts import Hosts, two_hosts
from support.processes import kill as strike
from support.processes import victims
from support.program import machine
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from opentau_train.checkpoints import commit

REPO = Path(__file__).parent.parent
DATA = REPO / "tests" / "data"
VALIDATE_EVERY = 5
MINUTE = 60.0
LIMITS = {"network": 2 * MINUTE}
"""Seconds in which the survivors of a victim end, where it isn't a minute: this many on a machine that is busy."""
PARTING = 6 * MINUTE
"""When the last step is over torchrun's agents wait for each other, five minutes at most: a network that goes away then
costs nothing else."""

CONFIG = [
    "+recipe=lerobot",
    f"data.sources.main.root={DATA / 'lerobot_v30'}",
    "data.sources.main.val_split_ratio=0.3",
    "data.num_workers=1",
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
    "1 rank, saves at once": (1, ["checkpoint.async=false"]),
    "1 rank": (1, []),
    "2 ranks, saves at once": (2, ["checkpoint.async=false"]),
    "2 ranks, sharded": (2, ["parallelism=fsdp"]),
    "2 hosts": (2, []),
}
HOSTS = "2 hosts"


@dataclass
class Report:
    """What a campaign did: kills by (phase, victim), rounds it took, the longest end of the survivors in seconds."""

    kills: Counter = field(default_factory=Counter)
    rounds: int = 0
    slowest: dict[str, float] = field(default_factory=dict)


def campaign(
    folder: Path,
    *,
    kills: int,
    seed: int,
    ranks: int,
    overrides: Sequence[str],
    steps: int = 40,
    hosts: Hosts | None = None,
    popen: Callable[..., subprocess.Popen] = subprocess.Popen,
) -> Report:
    """At least `kills` kills, over as many runs of `steps` steps as that takes, each process started by `popen`. Raises
    AssertionError where a promise is broken."""
    draw, report = random.Random(seed), Report()
    start = partial(launch, popen=popen, hosts=hosts)
    arguments = [*CONFIG, f"trainer.steps={steps}", *overrides]
    start(arguments, folder / "whole", ranks).communicate()
    expected = everything(folder / "whole")
    while sum(report.kills.values()) < kills:
        run_dir = folder / f"round_{report.rounds}"
        while killed_once(start, arguments, run_dir, ranks, draw, report, hosts):
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


def killed_once(
    start: Callable[..., subprocess.Popen],
    arguments: Sequence[str],
    run_dir: Path,
    ranks: int,
    draw: random.Random,
    report: Report,
    hosts: Hosts | None,
) -> bool:
    """Start or resume the run and kill it at a random moment; False when it came to its end before."""
    before = commit.newest(run_dir / "checkpoints")
    process = start([*arguments, "resume=auto"], run_dir, ranks)
    moment = draw.choice([in_step, in_save, in_validation])
    rows = len(read_rows(run_dir)) + draw.randint(1, 5)
    came = wait_until(lambda: len(read_rows(run_dir)) >= rows and moment(run_dir), process)
    time.sleep(draw.random() * 0.1)
    victim = kill(process, ranks, draw, report, hosts) if came and process.poll() is None else None
    if victim is None:
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return False
    phase = next(name for name, holds in PHASES.items() if holds(run_dir))
    report.kills[phase, victim] += 1
    print(f"kill {sum(report.kills.values())}: {victim}, in a {phase}, {run_dir.name}", file=sys.stderr, flush=True)
    newest = commit.newest(run_dir / "checkpoints")
    last = run_dir / "checkpoints" / "last"
    if before is not None:
        assert newest is not None and int(newest.name) >= int(before.name), (before, newest)
    if last.exists() or newest is not None:
        # Between the rename and the link's move, `last` is the one before: whole too.
        assert newest is not None and (not last.exists() or commit.flaw(last.resolve()) is None), (last, newest)
    return True


def kill(process: subprocess.Popen, ranks: int, draw: random.Random, report: Report, hosts: Hosts | None) -> str | None:
    """SIGKILL to a random victim, after which the others must end by themselves. None if the run had ended."""
    kinds = victims(process.pid, ranks, hosts is not None)
    victim = draw.choice([*kinds, *(["network"] if hosts else [])])
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
        strike(kinds["all"])  # torchrun gives each rank a group of its own
        process.communicate()
        return victim if process.returncode == -signal.SIGKILL else None
    started = time.monotonic()
    if victim == "network":
        hosts.cable("down")  # type: ignore[union-attr]
    else:
        strike([draw.choice(kinds[victim])])
    try:
        process.communicate(timeout=PARTING)
    finally:
        if victim == "network":
            hosts.cable("up")  # type: ignore[union-attr]
    if process.returncode == 0:
        return None  # the last step was over
    took = time.monotonic() - started
    report.slowest[victim] = max(report.slowest.get(victim, 0.0), took)
    assert took < LIMITS.get(victim, MINUTE), f"the others outlived a killed {victim} by {took:.0f} s"
    return victim


def launch(
    arguments: Sequence[str],
    run_dir: Path,
    ranks: int,
    hosts: Hosts | None = None,
    popen: Callable[..., subprocess.Popen] = subprocess.Popen,
) -> subprocess.Popen:
    program = ["-m", "opentau_train", *arguments, f"paths.run_dir={run_dir}"]
    command = [sys.executable, *program]
    if hosts:
        command = hosts.command(program)
    elif ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return (subprocess.Popen if hosts else popen)(  # an agent of another network is a shell's child
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **({"GLOO_SOCKET_IFNAME": "cable"} if hosts else {})},
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
    parser.add_argument("--kills", type=int, default=70)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=VARIANTS, action="append", help="this launch, may be given again (all)")
    options = parser.parse_args()
    names = options.only or list(VARIANTS)
    total, began = 0, time.monotonic()
    print(f"{machine()}\n\n| launch | victim | in a step | in a save | in a validation | slowest end of the others |")
    print("|---|---|---|---|---|---|")
    for name in names:
        ranks, overrides = VARIANTS[name]
        with (
            tempfile.TemporaryDirectory(prefix="kill_campaign_") as folder,
            two_hosts() if name == HOSTS else nullcontext() as hosts,
        ):
            report = campaign(
                Path(folder),
                kills=-(-options.kills // len(names)),
                seed=options.seed * len(VARIANTS) + list(VARIANTS).index(name),
                ranks=ranks,
                overrides=overrides,
                hosts=hosts,
            )
        total += sum(report.kills.values())
        for victim in sorted({victim for _, victim in report.kills}):
            nums = " | ".join(str(report.kills[phase, victim]) for phase in ("step", "save", "validation"))
            slowest = f"{report.slowest[victim]:.1f} s" if victim in report.slowest else ""
            print(f"| {name} | {victim} | {nums} | {slowest} |", flush=True)
    hours = (time.monotonic() - began) / 3600
    print(f"\n{total} kills in {hours * 60:.0f} minutes, {total / hours:.0f} an hour; {machine()}")
    print("every run ended bit-equal to its uninterrupted one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
