"""A test marked `timed` has a second chance that is told, and no other test has one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.program import REPO, environment

SUITE = """
import pathlib, pytest
FOLDER = pathlib.Path(__file__).parent

@pytest.fixture
def fresh(tmp_path):
    return tmp_path / "once"

def attempt(name, passes_at, fresh):
    fresh.mkdir()  # fails where the second run has the first one's fixtures
    attempts = FOLDER / f"{name}.attempts"
    number = len(attempts.read_text()) + 1 if attempts.exists() else 1
    attempts.write_text("x" * number)
    print("attempt", number, "of", name)
    assert number >= passes_at, f"{name} missed its limit"

@pytest.mark.timed
@pytest.mark.parametrize("passes_at", [1, 2, 3])
def test_timed(passes_at, fresh):
    attempt(f"timed_{passes_at}", passes_at, fresh)

def test_usual(fresh):
    attempt("usual", 2, fresh)

def test_that_follows():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["one process", "a worker"])
def test_only_a_timed_test_runs_twice_and_its_first_failure_is_printed(tmp_path: Path, workers):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    timed: with a limit of time\ntimeout = 60\n")
    (tmp_path / "test_it.py").write_text(SUITE)
    words = [sys.executable, "-m", "pytest", "-p", "tests.retry", *workers, str(tmp_path)]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment(PYTHONPATH=str(REPO)), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "2 failed, 3 passed" in done.stdout, done.stdout
    attempts = {path.stem: len(path.read_text()) for path in tmp_path.glob("*.attempts")}
    assert attempts == {"timed_1": 1, "timed_2": 2, "timed_3": 2, "usual": 1}
    for test, told in (("timed[1]", False), ("timed[2]", True), ("timed[3]", True), ("usual", False)):
        assert (f"test_{test}: first failure, before the test was run once more" in done.stdout) == told, done.stdout
    assert "attempt 1 of timed_2" in done.stdout and "timed_2 missed its limit" in done.stdout
