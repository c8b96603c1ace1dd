"""`launchers/slurm/sweep.py`, and train.sbatch with and without an image, with stand-ins for SLURM's commands.

The cluster itself: tests/slurm.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.droid_datasets import write_droid
from tests.program import REPO

LAUNCHERS = REPO / "launchers"


@pytest.fixture(scope="module")
def droid(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "droid_1.0.1"
    write_droid(root)
    return root


FAKE_SBATCH = '#!/usr/bin/env bash\nprintf "%s\\n" "$RUN_DIR" "$@" "" >>"$RECORD"\necho "17;cluster"\n'


def sweep(folder: Path, *words: str) -> subprocess.CompletedProcess:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "sbatch").write_text(FAKE_SBATCH)
    (folder / "bin" / "sbatch").chmod(0o755)
    env = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "RECORD": str(folder / "record")}
    command = [sys.executable, str(LAUNCHERS / "slurm" / "sweep.py"), *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def test_a_sweep_is_a_job_a_combination_each_with_its_directory(tmp_path):
    values = ["optimizer.lr=1e-4,3e-4", "data.image_size=[64,64]", "seed=choice(1,2)"]
    done = sweep(tmp_path, "runs/lr", "--nodes=2", "--", *values)
    assert done.returncode == 0, done.stderr
    jobs = [job.splitlines() for job in (tmp_path / "record").read_text().strip().split("\n\n")]
    assert [job[-3:] for job in jobs] == [
        [f"optimizer.lr={lr}", "data.image_size=[64,64]", f"seed={seed}"]
        for lr in ("0.0001", "0.0003")
        for seed in (1, 2)
    ]
    assert all(job[1:4] == ["--parsable", "--nodes=2", str(LAUNCHERS / "slurm" / "train.sbatch")] for job in jobs)
    assert len({job[0] for job in jobs}) == 4
    assert jobs[1][0] == str(tmp_path / "runs" / "lr" / "001-optimizer.lr=0.0001,seed=2")
    rows = [json.loads(line) for line in (tmp_path / "runs" / "lr" / "sweep.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows] == [job[0] for job in jobs] and {row["job"] for row in rows} == {"17"}


def test_a_dry_sweep_submits_nothing_and_mistakes_are_told(tmp_path):
    done = sweep(tmp_path, "runs/lr", "--dry-run", "--", "scheduler.warmup_steps=range(0,3)")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3 and "sbatch" in done.stdout
    for words in (["--", "a=1,2"], ["runs/lr", "a=1"], ["runs/lr", "--", "a=[1"]):
        done = sweep(tmp_path, *words)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "record").exists() and not (tmp_path / "runs").exists()


FAKE_SRUN = r"""#!/usr/bin/env bash
printf '%s\n' "MASTER_ADDR=$MASTER_ADDR" "$@" "" >>"$RECORD"
"""
FAKE_SCONTROL = '#!/usr/bin/env bash\n[[ $2 != hostnames ]] || printf "n1\\nn2\\n"\n'


def job(folder: Path, droid: Path, **variables: str) -> list[list[str]]:
    """What train.sbatch starts with srun, in a job of the nodes n1 and n2."""
    (folder / "bin").mkdir()
    for name, text in {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    python = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
    env = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "RECORD": str(folder / "record"), "PYTHON": python}
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "OPENTAU_ROOT": str(REPO), "DATASET_PATH": str(droid)}
    command = ["bash", str(LAUNCHERS / "slurm" / "train.sbatch"), "trainer.steps=3"]
    done = subprocess.run(command, cwd=folder, env=env | variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [step.splitlines() for step in (folder / "record").read_text().strip().split("\n\n")]


def test_in_a_container_neither_torch_nor_the_package_are_needed_outside(tmp_path, droid):
    check, train = job(tmp_path, droid, CONTAINER_IMAGE="image.sqsh", CONTAINER_MOUNTS="/scratch:/scratch")
    run = tmp_path / "runs" / "slurm-7"
    options = ["--container-image=image.sqsh", f"--container-workdir={tmp_path}"]
    options += [f"--container-mounts={REPO},{run},{run}/logs,{tmp_path},{droid},/scratch:/scratch"]
    assert all(option in check and option in train for option in options)
    assert check[1:3] == ["--nodes=1", "--ntasks=1"] and "opentau_train.tools.check" in check
    assert train[0] == "MASTER_ADDR=n1" and f"{REPO}/launchers/slurm/node.sh" in train
    assert train[-4:] == ["+recipe=droid_policy", "resume=auto", f"paths.run_dir={run}", "trainer.steps=3"]


def test_without_an_image_srun_gets_no_option_for_one(tmp_path, droid):
    (train,) = job(tmp_path, droid, CHECK_CONFIG="0", PYTHON=sys.executable)
    assert train[1:4] == ["--label", "--kill-on-bad-exit=1", f"{REPO}/launchers/slurm/node.sh"]
