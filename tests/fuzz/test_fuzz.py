"""Damaged and hostile files by the thousand, in a process of its own: one that crashes is seen, too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.fuzz.targets import TARGETS
from tests.nightly import at_night
from tests.program import REPO, environment

FEW = 600
"""Half a minute's, on a machine that has nothing else to do."""
MANY = 100_000


def fuzz(num: int, seed: int, *names: str, timeout: float) -> str:
    command = [sys.executable, "-m", "tests.fuzz", str(num), str(seed), *names]
    ended = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-6000:]
    return ended.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_damaged_file_is_refused_or_read():
    said = fuzz(FEW, 1, timeout=800)
    assert all(f"{name}: " in said for name in TARGETS) and "refused" in said and "FAILED" not in said


@at_night
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("name", TARGETS)
def test_a_hundred_thousand_damaged_files_are_refused_or_read(name):
    """`MANY` together, other ones each night."""
    num = -(-MANY * TARGETS[name].share // sum(target.share for target in TARGETS.values()))
    seed = int(os.environ.get("FUZZ_SEED", "0")) or int.from_bytes(os.urandom(4))
    print(fuzz(num, seed, name, timeout=5 * 3600), f"FUZZ_SEED={seed}")
