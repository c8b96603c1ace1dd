"""A test marked `timed` has a second chance that is told, and no other test has one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.program import REPO, environment

SUITE = """
import pathlib, pytest
ATTEMPTS = pathlib.Path(__file__).with_suffix(".attempts")

@pytest.fixture
def fresh(tmp_path):
    return tmp_path / "once"

{mark}
def test_of_processes(fresh):
    fresh.mkdir()  # fails where the second run has the first one's fixtures
    attempt = ATTEMPTS.read_text() if ATTEMPTS.exists() else ""
    ATTEMPTS.write_text(attempt + "x")
    print("attempt", len(attempt) + 1)
    assert len(attempt) + 1 >= {passes_at}, "missed its limit"

def test_that_follows():
    pass
"""


@pytest.mark.parametrize(
    ("workers", "mark", "passes_at", "attempts", "passed"),
    [
        ((), "@pytest.mark.timed", 1, 1, True),
        (("-n", "1"), "@pytest.mark.timed", 2, 2, True),
        ((), "@pytest.mark.timed", 3, 2, False),
        ((), "", 2, 1, False),
    ],
)
def test_only_a_timed_test_runs_twice_and_its_first_failure_is_printed(
    tmp_path: Path, workers, mark, passes_at, attempts, passed
):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    timed: with a limit of time\ntimeout = 60\n")
    (tmp_path / "test_it.py").write_text(SUITE.format(mark=mark, passes_at=passes_at))
    words = [sys.executable, "-m", "pytest", "-p", "tests.retry", *workers, str(tmp_path)]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment(PYTHONPATH=str(REPO)), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode == 0) == passed, done.stdout
    assert len((tmp_path / "test_it.attempts").read_text()) == attempts
    assert f"{1 + passed} passed" in done.stdout
    told = "test_of_processes: first failure, before the test was run once more" in done.stdout
    assert told == (attempts == 2) == ("missed its limit" in done.stdout and "attempt 1" in done.stdout and bool(mark))
