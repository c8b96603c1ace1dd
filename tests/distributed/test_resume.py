"""Stopped in any way and started again: the same numbers as a run that never stopped."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opentau_train.checkpoints import card, pretrained
from opentau_train.checkpoints.contents import load_weights
from opentau_train.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from tests.nightly import by_day
from tests.program import TOY, assert_close, metrics, run, start, train_here

pytestmark = pytest.mark.distributed

RUN = [
    *TOY,
    "trainer.steps=24",
    "checkpoint.every=3",
    "checkpoint.keep_last=2",
    "validation.every=8",
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


@pytest.mark.parametrize("workers", by_day([0, 2], 2))
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


SIGNALS = [
    (signal.SIGTERM, EXIT_PREEMPTED),
    (signal.SIGUSR1, EXIT_PREEMPTED),
    (signal.SIGHUP, EXIT_PREEMPTED),
    (signal.SIGINT, EXIT_INTERRUPTED),
]


@pytest.mark.parametrize(("number", "code"), by_day(SIGNALS, *SIGNALS[2:]))
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


LEGS = (
    (6, 4, ["parallelism=hsdp", "parallelism.data_parallel_shard_degree=2", "checkpoint.async=true"]),
    (12, 2, ["parallelism=fsdp", "data.num_workers=1"]),
    (16, 1, ["data.num_workers=3"]),
    (24, 2, ["parallelism=ddp", "checkpoint.async=true"]),
)
"""(to which step, ranks, how): every leg reads what another layout has written."""


def test_elastic_resume_on_other_numbers_of_ranks_layouts_and_workers(uninterrupted, tmp_path):
    # the schedule is a function of (step, steps): stop early through a constant rate, not a shorter schedule
    common = [
        *RUN,
        "scheduler=constant",
        "scheduler.warmup_steps=2",
        "trainer.ema_decay=0.9",
        "checkpoint.keep_every=6",
    ]
    resumed_from = 0
    for steps, ranks, how in LEGS:
        command = [*common, f"trainer.steps={steps}", *how]
        done = run([*command, "resume=auto", f"paths.run_dir={tmp_path / 'elastic'}"], ranks)
        assert done.returncode == 0, done.stderr
        if resumed_from:
            assert f"safe    trainer.steps: {resumed_from} -> {steps}" in done.stderr
        resumed_from = steps
    whole = train_here(common, tmp_path / "whole")
    found = metrics(tmp_path / "elastic")
    expected = metrics(whole)
    for step in (6, 12, 16):  # the last step of each leg validates too
        found[step] = {k: v for k, v in found[step].items() if k in expected[step]}
    assert [r["Training/BatchId"] for r in found.values()] == [r["Training/BatchId"] for r in expected.values()]
    assert_close(found, expected, training=1e-4, validation=1e-4)
    for part in ("model", "ema"):
        ours, theirs = (weights(path / "checkpoints" / "last", part) for path in (tmp_path / "elastic", whole))
        assert all((ours[name] - value).abs().max() <= 1e-4 for name, value in theirs.items())


def weights(checkpoint: Path, part: str) -> dict[str, torch.Tensor]:
    """The parameters, or their average, of a checkpoint's shards put together."""
    policy = pretrained.build(card.read_card(checkpoint / card.FOLDER))
    load_weights(checkpoint, policy, part)
    return {name: value.detach() for name, value in policy.named_parameters()}


def test_the_shards_of_any_layout_are_the_weights_beside_them_bit_for_bit(tmp_path):
    command = [*TOY, "parallelism=fsdp", "trainer.steps=3", "validation.every=0", f"paths.run_dir={tmp_path / 'run'}"]
    done = run([*command, "checkpoint.async=true", "trainer.precision=bf16"], 2)
    assert done.returncode == 0, done.stderr
    last = tmp_path / "run" / "checkpoints" / "last"
    beside = load_file(last / "pretrained_model" / "model.safetensors")
    shards = weights(last, "model")
    assert beside.keys() == shards.keys() and all(torch.equal(beside[n], v) for n, v in shards.items())
    assert len(list((last / "state").glob("*.distcp"))) == 2
    more = [*TOY, "trainer.steps=3", "trainer.precision=bf16", "validation.every=0", f"resume={tmp_path / 'run'}"]
    assert run([*more, f"paths.run_dir={tmp_path / 'run'}"]).returncode == 0  # nothing left to train


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
