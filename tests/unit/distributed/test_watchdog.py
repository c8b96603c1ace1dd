"""What the watchdog takes for progress before the first step, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from opentau_train.distributed import watchdog
from opentau_train.errors import EXIT_FAULT
from tests.program import environment

PROGRAM = """
import os, sys, time
from pathlib import Path
from opentau_train.distributed import watchdog

watchdog.START_MARGIN, watchdog.GRACE = 0.5, 0.1
folder, doing = Path(sys.argv[1]), sys.argv[2]
progress = watchdog.Progress()
with watchdog.watch(progress, folder, rank=0, size=1, timeout=1.0):
    if doing == "step":
        progress.enter("data wait", step=1)
    end = time.monotonic() + 6.0
    if doing == "wait":
        os.mkfifo(folder / "pipe")
        open(folder / "pipe").read()
    while time.monotonic() < end:
        if doing == "fetch":  # a little work now and then, as of a download
            sum(range(100_000))
            time.sleep(0.05)
"""


@pytest.mark.parametrize(
    ("doing", "code", "said"),
    [
        ("fetch", 0, ""),
        ("wait", EXIT_FAULT, "rank 0: no progress for 1.5 s in: opening data and policy, step 0"),
        ("step", EXIT_FAULT, "rank 0: no progress for 1 s in: data wait, step 1"),
    ],
)
def test_work_is_progress_before_the_first_step_and_waiting_for_a_pipe_is_none(doing, code, said, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), doing]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == code and said in done.stderr, done.stderr
    if said:
        assert "error: the run stands still; where each rank was:" in done.stderr
        assert "Current thread" in Path(tmp_path / "stacks" / "rank0.txt").read_text()


def test_nothing_is_written_into_a_directory_that_has_taken_the_runs_place(tmp_path):
    run_dir, progress = tmp_path / "run", watchdog.Progress()
    run_dir.mkdir()
    with watchdog._LastResort(run_dir / "stacks" / "rank0.lock") as last_resort:
        run_dir.rename(tmp_path / "moved")
        run_dir.mkdir()
        progress.enter("forward and backward", 1)
        assert last_resort.of(progress) != 2 and (tmp_path / "moved" / "stacks" / "rank0.lock").exists()
    assert not list(run_dir.iterdir())


def test_without_its_directory_a_rank_has_stderr(tmp_path):
    progress = watchdog.Progress()
    progress.enter("forward and backward", 1)
    with watchdog._LastResort(tmp_path / "run" / "stacks" / "rank0.lock") as last_resort:
        assert last_resort.of(progress) == 2
