"""What loses a run: two that write one directory, an agent that is gone, a directory that is gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from opentau_train.checkpoints import commit
from opentau_train.errors import EXIT_FAULT, EXIT_PREEMPTED, EXIT_USER
from opentau_train.sinks.jsonl import read_rows
from tests.nightly import by_day
from tests.program import TOY, children, command, environment, metrics, ranks_of, run, start, train_here

pytestmark = [pytest.mark.distributed, pytest.mark.timed]

RUN = [*TOY, "validation.every=0", "logger=none", "scheduler=constant", "checkpoint.every=0"]
ENDLESS = [*RUN, "trainer.steps=1000000"]


def wait_for_rows(run_dir: Path, process, num: int = 3) -> None:
    path, end = run_dir / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < num:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it did not get there"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_second_run_in_the_same_directory_is_refused_and_the_first_goes_on(resume, tmp_path):
    run_dir = tmp_path / "run"
    first = start([*ENDLESS, f"paths.run_dir={run_dir}"])
    try:
        wait_for_rows(run_dir, first)
        second = run([*RUN, "trainer.steps=3", f"paths.run_dir={run_dir}", f"resume={resume}"], ranks=2)
        assert second.returncode == EXIT_FAULT and f"exitcode  : {EXIT_USER}" in second.stderr, second.stderr
        assert second.stderr.count("error: another run is writing this run directory: ") == 1, second.stderr
        assert f"process {first.pid}, since " in second.stderr and "trainer.steps=1000000" in second.stderr
        wait_for_rows(run_dir, first, 1 + len(metrics(run_dir)))
        first.send_signal(signal.SIGTERM)
        output = first.communicate(timeout=60)[0]
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    assert first.returncode == EXIT_PREEMPTED, output
    assert not (run_dir / "lock").exists()
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_ranks_and_workers_of_a_killed_agent_are_gone_within_half_a_minute_and_lose_nothing(tmp_path):
    run_dir = tmp_path / "run"
    process = start([*ENDLESS, "data.num_workers=2", f"paths.run_dir={run_dir}"], ranks=2)
    wait_for_rows(run_dir, process)
    ranks = list(ranks_of(process).values())
    pids = [*ranks, *(pid for rank in ranks for pid in children(rank).values())]
    assert len(pids) >= 6
    os.kill(process.pid, signal.SIGKILL)
    end = time.monotonic() + 30  # the promise
    while not all(map(is_gone, pids)):
        assert time.monotonic() < end, [pid for pid in pids if not is_gone(pid)]
        time.sleep(0.1)
    process.communicate()
    (saved,) = commit.complete(run_dir / "checkpoints")
    assert int(saved.name) == max(metrics(run_dir)) and not (run_dir / "lock").exists()


def test_ranks_whose_agent_is_killed_before_they_have_met_end_too(tmp_path):
    words = [*ENDLESS, f"paths.run_dir={tmp_path / 'run'}"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(command(words, 2), env=environment(), **pipes) as agent:  # with all its imports, as for users
        end = time.monotonic() + 100
        while len(ranks := list(children(agent.pid).values())) < 2:
            assert agent.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(3.0)  # they import torch
        agent.kill()
    end = time.monotonic() + 30  # the promise
    while not all(map(is_gone, ranks)):
        assert time.monotonic() < end, [pid for pid in ranks if not is_gone(pid)]
        time.sleep(0.1)
    assert not commit.complete(tmp_path / "run" / "checkpoints")


def test_workers_of_a_killed_rank_die_with_it(tmp_path):
    run_dir = tmp_path / "run"
    process = start([*ENDLESS, "data.num_workers=2", f"paths.run_dir={run_dir}"])
    wait_for_rows(run_dir, process)
    pids = list(children(process.pid).values())
    assert len(pids) >= 2
    process.send_signal(signal.SIGKILL)
    end = time.monotonic() + 20
    while not all(map(is_gone, pids)):
        assert time.monotonic() < end
        time.sleep(0.1)
    process.communicate()
    done = run([*RUN, "trainer.steps=3", f"paths.run_dir={run_dir}", "resume=auto"])  # nobody holds its lock
    assert done.returncode == 0 and "does its holder live" not in done.stderr, done.stderr
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and {row["attempt"] for row in rows} == {2}
    assert list(read_rows(run_dir)) == [1, 2, 3]


GONE = [(how, ranks) for how in ("removed", "replaced") for ranks in (1, 2)]


@pytest.mark.parametrize(("how", "ranks"), by_day(GONE, ("removed", 2), ("replaced", 1)))
def test_a_run_directory_that_is_gone_is_noticed_and_the_run_is_saved_beside_it(how, ranks, tmp_path):
    run_dir = tmp_path / "run"
    process = start([*ENDLESS, "checkpoint.every=1000000", f"paths.run_dir={run_dir}"], ranks)
    try:
        wait_for_rows(run_dir, process, 5)
        os.rename(run_dir, tmp_path / "moved")
        if how == "removed":
            shutil.rmtree(tmp_path / "moved")
        else:
            run_dir.mkdir()
        output = process.communicate(timeout=100)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == EXIT_FAULT, output
    (rescued,) = tmp_path.glob("run.rescued-*")
    (saved,) = commit.complete(rescued / "checkpoints")
    assert output.count("error: the run directory is gone") == 1 and f"go on from it with resume={rescued}" in output
    assert f"step {int(saved.name)} is saved in {rescued}" in output
    assert ranks > 1 or "Traceback" not in output
    if how == "removed":
        assert list(metrics(rescued)) == list(range(1, int(saved.name) + 1)) and (rescued / "train.log").exists()
    else:
        assert list(metrics(tmp_path / "moved")) == list(range(1, int(saved.name) + 1)) and not os.listdir(run_dir)
    if ranks == 1:
        train_here([*RUN, f"trainer.steps={int(saved.name) + 2}", f"resume={rescued}"], rescued)
