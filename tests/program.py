"""Runs the program as tests need it: in this process for speed, as real processes where ranks or kills matter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import pytest

from opentau_train import cli, composing
from opentau_train.config.arguments import settable
from tests import warm

REPO = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"

TINY_POLICY = [
    "model.width=32",
    "model.depth=1",
    "model.heads=2",
    "model.max_prompt_bytes=8",
    "data.image_size=[32,32]",
]
"""A policy small enough that a step takes milliseconds."""

TOY = [
    "+recipe=lerobot",
    f"data.sources.main.root={DATA / 'lerobot_v30'}",
    "data.sources.main.val_split_ratio=0.3",
    f"data.sources.old.root={DATA / 'lerobot_v21'}",
    "data.sources.old.val_split_ratio=0.3",
    "data.sources.old.robot_type=toy6",  # six joints: not the other toy's norm head
    "data.num_workers=0",
    "trainer.global_batch_size=4",
    "trainer.log_every=1",
    "scheduler.warmup_steps=2",
    *TINY_POLICY,
]
"""A mixture of the two small real datasets (v3.0 with two cameras, v2.1 with one; other dims and rates)."""


NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="inductor compiles C++ on a CPU, and no compiler is found",
)

UNSET = ("DROID_ROOT", "DATASET_PATH", "VLM_SAFETENSORS_PATH", "HYDRA_FULL_ERROR")
"""Variables that a developer's machine may have, and a test must not."""


def environment(**extra: str) -> dict[str, str]:
    """One thread a process, the repository importable, no DROID_ROOT of the machine."""
    env = {k: v for k, v in os.environ.items() if k not in UNSET}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": "1", **extra}
    return env


def launcher(ranks: int) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else [])]


def command(arguments: list[str], ranks: int = 1) -> list[str]:
    return [*launcher(ranks), "-m", "opentau_train", *arguments]


def start(arguments: list[str], ranks: int = 1, cwd: Path | None = None, **env: str) -> subprocess.Popen:
    return warm.Popen(
        command(arguments, ranks),
        cwd=cwd,
        env=environment(**env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(arguments: list[str], ranks: int = 1, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    return warm.run(command(arguments, ranks), cwd=cwd, env=environment(**env), timeout=280)


def torchrun(ranks: int, *program: str | Path, **env: str) -> subprocess.CompletedProcess:
    """A script, or `-m` and a module, with its arguments on `ranks` ranks; of one rank without torchrun."""
    return warm.run([*launcher(ranks), *map(str, program)], cwd=REPO, env=environment(**env), timeout=880)


Runs = dict[Path, tuple[int, list[str]]]
"""{run directory: (ranks, arguments)}"""


def train_all(runs: Runs) -> None:
    """Train all, those of as many ranks one after another in the same processes; runs of fewer ranks come first."""
    shared = str(next(iter(runs)).parent / "compiled_code")
    for ranks in sorted({ranks for ranks, _ in runs.values()}):
        alike = [
            [f"paths.cache_dir={run_dir.parent / 'cache'}", *words, f"paths.run_dir={run_dir}"]
            for run_dir, (other, words) in runs.items()
            if other == ranks
        ]
        ended = torchrun(ranks, "-m", "tests.several", json.dumps(alike), TORCHINDUCTOR_CACHE_DIR=shared)
        assert ended.returncode == 0, ended.stderr[-5000:]


def children(pid: int) -> dict[str, int]:
    """{name: pid} of a process's children: `opentauN` is rank N; a loader worker's name has its pid behind it."""
    listed = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    pairs = [line.split() for line in listed.splitlines()]
    return {name if name.startswith("opentau") else f"{name}-{pid}": int(pid) for pid, name in pairs}


def ranks_of(process: subprocess.Popen) -> dict[int, int]:
    """{rank: pid} of what torchrun started."""
    names = children(process.pid)
    return {int(name.removeprefix("opentau")): pid for name, pid in names.items() if name.startswith("opentau")}


def train_here(arguments: list[str], run_dir: Path) -> Path:
    """Train in this process; returns the run directory. Errors are raised, not printed."""
    from opentau_train import loop

    overrides = [
        settable(a) for a in [*arguments, f"paths.run_dir={run_dir}", f"paths.cache_dir={run_dir.parent / 'cache'}"]
    ]
    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        tree = composing.plain(hydra.compose("train", overrides))
    assert loop.run(cli.checked(tree), tree) == 0
    return run_dir


def metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """{step: its numbers}, those of the clock and of rank 0's own process left out."""
    clocks = (
        "time",
        "attempt",
        "Timing/",
        "Memory/",
        "Training/SamplesPerSecond",
        "Training/TokensPerSecond",
        "Training/OpenDecoders",
        "Training/DecoderMemory",
    )
    rows: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update({k: v for k, v in row.items() if not k.startswith(clocks)})
    return rows


def assert_close(
    left: dict[int, dict], right: dict[int, dict], training: float, validation: float, what: str = ""
) -> None:
    """Same steps, same tags, numbers within the tolerances by their prefix. A failure names `what` and the step."""
    assert left.keys() == right.keys(), what
    for step, row in left.items():
        assert row.keys() == right[step].keys(), (what, step)
        for tag, value in row.items():
            limit = validation if tag.startswith("Validation") else training
            assert abs(value - right[step][tag]) <= limit, (what, step, tag, value, right[step][tag])
