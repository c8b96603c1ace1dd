"""`launchers/slurm/train.sbatch` on a real two-node cluster: stopped, queued again, finished, the same numbers."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import pytest

from opentau_train.sinks.trackers import run_id
from tests.nightly import at_night
from tests.program import TOY, assert_close, metrics, run
from tests.unit.sinks.curves import check_curves, parts

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timed, pytest.mark.timeout(600)]

RUN = [*TOY, "checkpoint.every=0", "validation.every=50", "validation.max_samples_per_group=4"]
WANDB = importlib.util.find_spec("wandb") is not None


def submit(
    cluster, sbatch, tmp_path: Path, steps: int, *options: str, logger: str = "none", **extra_env: str
) -> tuple[str, Path]:
    """The job and its run directory, named by the job's number. Its steps take a tenth of a second or more."""
    overrides = [*(o for o in RUN if not o.startswith("+recipe")), f"trainer.steps={steps}"]
    overrides += ["model._target_=tests.misbehaving.Slow", f"logger={logger}"]
    extra = " ".join(shlex.quote(o) for o in overrides)
    job = cluster.submit(*options, sbatch, cwd=tmp_path, RECIPE="lerobot", EXTRA_TAIL_OVERRIDES=extra, **extra_env)
    return job, tmp_path / "runs" / f"slurm-{job}"


def finished(cluster, job: str, tmp_path: Path) -> str:
    """Wait for the job's end; its output. The state must be COMPLETED after one restart."""
    state = cluster.wait(job, lambda s: s["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"))
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert state["JobState"] == "COMPLETED" and state["ExitCode"] == "0:0", output
    assert int(state["Restarts"]) >= 1, output
    return output


def uninterrupted(steps: int, tmp_path: Path) -> dict[int, dict[str, float]]:
    """The numbers of two ranks that nothing stopped."""
    done = run([*RUN, "logger=none", f"trainer.steps={steps}", f"paths.run_dir={tmp_path / 'whole'}"], ranks=2)
    assert done.returncode == 0, done.stderr
    whole = metrics(tmp_path / "whole")
    assert list(whole) == list(range(1, steps + 1)) and "Training/BatchId" in whole[1]
    return whole


@at_night
def test_requeued_by_hand_it_saves_resumes_and_finishes_with_the_same_numbers(cluster, sbatch, tmp_path):
    steps = 60
    trackers = {"logger": f"[tensorboard{',wandb' * WANDB}]", "WANDB_MODE": "offline"}
    job, run_dir = submit(cluster, sbatch, tmp_path, steps, "--time=10", **trackers)
    rows = run_dir / "metrics.jsonl"
    cluster.wait(job, lambda s: rows.exists() and rows.read_text().count("\n") >= 5)
    cluster.call("scontrol", "requeue", job)
    output = finished(cluster, job, tmp_path)
    # checkpoint.every=0: what it resumed from was saved on the way out
    assert output.count("preempted at step") == 1 and output.count("resumed from") == 1
    assert metrics(run_dir) == uninterrupted(steps, tmp_path)  # to the last bit: losses, gradients, validations
    check_curves(run_dir, range(1, steps + 1))  # one run in TensorBoard, and one in W&B
    if WANDB:
        (one, before), (other, after) = parts(run_dir)
        # SLURM's signal ends W&B's own process at once: what it held back is in the part of the resumed run.
        assert other == run_id(run_dir) and one in ("", other)
        assert {**before, **after}.keys() == {*range(1, steps + 1)}
    logs = {p.name for p in (run_dir / "logs").iterdir()}
    assert logs == {f"node{n}.restart{k}.log" for n in (0, 1) for k in (0, 1)}
    for name in logs:
        assert "torchrun --nnodes 2 --rdzv-backend c10d" in (run_dir / "logs" / name).read_text()


def test_requeued_it_goes_on_with_fewer_nodes_and_the_same_samples(cluster, sbatch, tmp_path):
    steps = 40
    job, run_dir = submit(cluster, sbatch, tmp_path, steps, "--time=10")
    rows = run_dir / "metrics.jsonl"
    cluster.wait(job, lambda s: rows.exists() and rows.read_text().count("\n") >= 5)
    cluster.call("scontrol", "requeue", job)
    cluster.wait(job, lambda s: s["JobState"] == "PENDING")
    cluster.call("scontrol", "update", f"JobId={job}", "NumNodes=1")
    finished(cluster, job, tmp_path)
    found, whole = metrics(run_dir), uninterrupted(steps, tmp_path)
    assert [r["Training/BatchId"] for r in found.values()] == [r["Training/BatchId"] for r in whole.values()]
    assert_close(found, whole, training=1e-4, validation=1e-4)


def test_before_the_time_limit_it_saves_and_queues_itself_again(cluster, sbatch, tmp_path):
    steps = 400  # more than fit into the half minute in which SLURM looks at the limit again
    # It sends the signal up to a minute early: at its first look here, which may be before training begins.
    job, run_dir = submit(cluster, sbatch, tmp_path, steps, "--time=2", "--signal=B:USR1@110")
    cluster.wait(job, lambda s: int(s["Restarts"]) >= 1)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    output = finished(cluster, job, tmp_path)
    assert "preempted by the time limit" in output and "preempted at step" in output
    assert metrics(run_dir) == uninterrupted(steps, tmp_path)  # to the last bit: losses, gradients, validations


def test_a_mistake_ends_the_job_with_2_and_without_a_restart(cluster, sbatch, tmp_path):
    job, run_dir = submit(cluster, sbatch, tmp_path, 0)
    state = cluster.wait(job, lambda s: s["JobState"] == "FAILED")
    assert state["ExitCode"] == "2:0" and state["Restarts"] == "0"
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert "trainer.steps must be greater than 0" in output and "Traceback" not in output
    assert not run_dir.exists()
