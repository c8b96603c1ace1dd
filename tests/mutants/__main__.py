"""How many of the bugs in `listed` the fast tests notice.

    python -m tests.mutants [--only TEXT] [--workers 2] [--whole] [--control]

The repository is copied once for each worker. A mutant is tried on the tests that its file's room has, and with
`--whole` what outlives them on all fast tests. Each is killed by the first test that fails, or by one that doesn't end.
`--control` runs the tests of all rooms on the program as it is: what fails there kills nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate  # noqa: F401
import hydra  # noqa: F401
import hypothesis  # noqa: F401
import pyarrow.parquet  # noqa: F401
import pytest
import torch.distributed.checkpoint  # noqa: F401

from tests.mutants.listed import MUTANTS, Mutant

# What is imported above and not used is there for the forks (`first_failed`).
REPO = Path(__file__).parent.parent.parent
LIMIT = 600
"""Seconds for the tests of a room: what hangs is noticed, too."""
FAST = "not slow and not slurm and not distributed and not cuda and not lerobot and not simulation and not trackers"
REFERENCE, GOLDEN = "tests/golden/test_reference.py", "tests/golden/test_losses.py"
VALIDATION = "tests/property/test_validation.py"
ROOMS = {
    "step.py": (REFERENCE, "tests/unit/test_step.py", GOLDEN),
    "optim.py": (REFERENCE, "tests/unit/test_optim.py"),
    "metrics": ("tests/unit/metrics", REFERENCE, "tests/unit/test_validate.py", VALIDATION),
    "models/average.py": (REFERENCE, "tests/unit/test_optim.py", "tests/unit/test_step.py", VALIDATION),
    "models/inputs.py": ("tests/unit/models/test_flow_losses.py", "tests/unit/models/test_wam.py", GOLDEN),
    "checkpoints": ("tests/unit/checkpoints",),
    "validation": (
        REFERENCE,
        "tests/unit/data/order/test_windows.py",
        "tests/unit/test_validate.py",
        "tests/unit/validation",
        VALIDATION,
    ),
    "data/order": (
        "tests/unit/data/order",
        "tests/property/test_tape.py",
        "tests/property/test_lanes.py",
        REFERENCE,
        "tests/property/test_stream.py",
    ),
    "data/chunk.py": ("tests/unit/data/order", REFERENCE, "tests/unit/data/lerobot/test_future.py"),
    "data/lerobot/near_frames.py": (
        "tests/unit/data/order/test_windows.py",
        "tests/unit/data/lerobot/test_future.py",
        "tests/unit/data/load",
    ),
    "data/mixture": (REFERENCE, "tests/unit/data/mixture", VALIDATION),
    "data/transforms": (REFERENCE, "tests/unit/data/transforms", "tests/unit/data/mixture", "tests/unit/deploy"),
    "data/load": ("tests/unit/data/load", REFERENCE, "tests/unit/data/lerobot/test_weights.py", GOLDEN),
}
"""{a file or folder of the package: the tests that are tried first, in this order}."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants whose file or name has this text")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--whole", action="store_true", help="try survivors on all fast tests")
    parser.add_argument("--control", action="store_true", help="run the tests without a bug")
    options = parser.parse_args()
    if options.control:
        return control()
    chosen = [m for m in MUTANTS if options.only in f"{m.file} {m.name}"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.workers) as pool:
        copies: queue.Queue[Path] = queue.Queue()
        for i in range(options.workers):
            copies.put(copied(Path(folder) / str(i)))
        ends = list(pool.map(lambda mutant: judged(mutant, copies, options.whole), chosen))
    survivors = [mutant for mutant, killer in zip(chosen, ends, strict=True) if killer is None]
    killed = len(chosen) - len(survivors)
    print(f"\nkilled: {killed} of {len(chosen)}, {100 * killed / max(1, len(chosen)):.0f}%")
    for mutant in survivors:
        print(f"survives: {mutant.file}: {mutant.name}")
    return 0


def control() -> int:
    """The code to end with: 1 where a test fails without a bug."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder) / "0")
        failed = {place: first_failed(copy, tests) for place, tests in ROOMS.items()}
    for place, test in failed.items():
        print(f"{place}: {test or 'all pass'}")
    return int(any(failed.values()))


def copied(folder: Path) -> Path:
    """What the tests need of the repository, in `folder`."""
    left_out = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")
    shutil.copytree(REPO, folder, ignore=left_out, symlinks=True)
    (folder / ".venv").symlink_to(REPO / ".venv")
    return folder


def judged(mutant: Mutant, copies: queue.Queue[Path], whole: bool) -> str | None:
    """Which test kills `mutant`; None where it survives."""
    copy = copies.get()
    file, started = copy / "opentau_train" / mutant.file, time.perf_counter()
    text = file.read_text()
    assert text.count(mutant.before) == 1, (mutant.file, mutant.before)
    file.write_text(text.replace(mutant.before, mutant.after))
    try:
        room = next(tests for place, tests in ROOMS.items() if mutant.file.startswith(place))
        killer = first_failed(copy, room) or (first_failed(copy, ("tests",)) if whole else None)
    finally:
        file.write_text(text)
        copies.put(copy)
    print(f"{time.perf_counter() - started:4.0f} s  {mutant.file}: {mutant.name}: {killer or 'SURVIVES'}", flush=True)
    return killer


def first_failed(copy: Path, tests: tuple[str, ...]) -> str | None:
    """In a fork of this process, which has imported what takes long, and nothing of the program."""
    there = [test for test in tests if (copy / test).exists()]
    words = ["-m", FAST, "-x", "-q", "--no-header", "-p", "no:cacheprovider", "--hypothesis-seed=0", *there]
    log = copy.with_suffix(".log")
    child = multiprocessing.get_context("fork").Process(target=run_tests, args=(copy, words, log))
    child.start()
    child.join(LIMIT)
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)
        return f"no end within {LIMIT} s"
    if child.exitcode == 0:
        return None
    failed = [line for line in log.read_text().splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if not failed:
        raise SystemExit(f"pytest itself failed:\n{log.read_text()[-2000:]}")
    return failed[0].split(" - ")[0]


def run_tests(copy: Path, words: list[str], log: Path) -> None:
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "opentau_train")]:
        del sys.modules[name]
    sys.path[:0] = [str(copy)]
    os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    code = pytest.main(words)
    sys.stdout.flush()
    os._exit(int(code))


if __name__ == "__main__":
    sys.exit(main())
