"""Stopped in any way and started again: the same numbers as a run that never stopped."""

import json
import os
import signal
import time

import pytest

from opentau_train.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from tests.program import TOY, assert_close, metrics, run, start, train_here

pytestmark = pytest.mark.distributed

RUN = [
    *TOY,
    "trainer.steps=40",
    "checkpoint.every=3",
    "checkpoint.keep_last=2",
    "validation.every=10",
    "validation.max_samples_per_group=5",
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return metrics(train_here(RUN, tmp_path_factory.mktemp("whole") / "run"))


def wait_for_step(run_dir, step, process, seconds=120):
    end = time.time() + seconds
    while time.time() < end:
        path = run_dir / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= step:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError("the run did not get there in time")


@pytest.mark.parametrize("workers", [0, 2])
def test_sigkill_and_resume_equals_uninterrupted_bit_for_bit(workers, uninterrupted, tmp_path):
    command = [*RUN, f"data.num_workers={workers}", "resume=auto", f"paths.run_dir={tmp_path}"]
    for lines in (4, 11):
        process = start(command)
        wait_for_step(tmp_path, lines, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path) == uninterrupted
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGUSR1, EXIT_PREEMPTED), (signal.SIGINT, EXIT_INTERRUPTED)],
)
def test_signal_saves_and_exits_with_its_code_then_resumes(number, code, uninterrupted, tmp_path):
    command = [*RUN, "checkpoint.every=0", "data.num_workers=1", f"paths.run_dir={tmp_path}"]
    process = start(command)
    wait_for_step(tmp_path, 3, process)
    os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    assert "Traceback" not in output and "resume=auto" in output
    done = run([*command, "resume=auto"])
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path) == uninterrupted


def test_elastic_resume_on_other_numbers_of_ranks_and_workers(uninterrupted, tmp_path):
    for steps, ranks, workers in ((8, 4, 0), (16, 2, 1), (24, 1, 3), (40, 2, 0)):
        # the schedule is a function of (step, steps): stop early through a constant rate, not a shorter schedule
        command = [
            *RUN,
            "scheduler=constant",
            "scheduler.warmup_steps=2",
            f"trainer.steps={steps}",
            f"data.num_workers={workers}",
        ]
        done = run([*command, "resume=auto", f"paths.run_dir={tmp_path / 'elastic'}"], ranks)
        assert done.returncode == 0, done.stderr
    whole = train_here([*RUN, "scheduler=constant", "scheduler.warmup_steps=2"], tmp_path / "whole")
    found = metrics(tmp_path / "elastic")
    expected = metrics(whole)
    for step in (8, 16, 24):  # the last step of each leg validates too
        found[step] = {k: v for k, v in found[step].items() if k in expected[step]}
    assert [r["Training/BatchId"] for r in found.values()] == [r["Training/BatchId"] for r in expected.values()]
    assert_close(found, expected, training=1e-4, validation=1e-4)


def test_half_a_checkpoint_is_never_used(tmp_path):
    short = [*RUN, "trainer.steps=6"]
    train_here(short, tmp_path / "run")
    torn = tmp_path / "run" / "checkpoints" / "00000099.tmp"
    torn.mkdir()
    (torn / "run.json").write_text(json.dumps({"version": 1, "step": 99}))
    done = run([*short, "trainer.steps=7", "resume=auto", f"paths.run_dir={tmp_path / 'run'}"])
    assert done.returncode == 0 and "at step 6" in done.stderr


def test_second_ctrl_c_ends_at_once(tmp_path):
    process = start([*RUN, "trainer.steps=100000", f"paths.run_dir={tmp_path}"])
    wait_for_step(tmp_path, 2, process)
    os.kill(process.pid, signal.SIGSTOP)  # both arrive before the step ends
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.wait(timeout=30)
    assert process.returncode in (-signal.SIGINT, EXIT_INTERRUPTED)
