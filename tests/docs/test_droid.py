"""Every command of docs/droid.md, run as it stands on small datasets in the schemas of the releases.

A block is one bash script. What isn't on this machine has a stand-in of the same name: the Hub (`hf`, which copies what
was made here), `sbatch` (which runs the batch script at once), `srun` and `torchrun` (which record their arguments; the
training is then run with these). Paths below /data are made below a temporary directory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import on_path
from tests.droid_datasets import published_filter, write_cosmos, write_droid
from tests.program import REPO, TINY_POLICY, environment, metrics, train_here

PAGE = (REPO / "docs" / "droid.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.S | re.M)
RANGES = [[[0, 40]], [[0, 10], [12, 48]], [[2, 40]], [[0, 38]]]

STAND_INS = {
    "hf": r"""
[[ $1 == download ]] && repo=$2 && shift 2
while (($#)); do
  case $1 in
    --local-dir) to=$2; shift ;;
    --repo-type) shift ;;
    --dry-run) echo "[dry-run] $repo"; exit ;;
    *) file=$1 ;;
  esac
  shift
done
mkdir -p "$to" && cp -r "$HUB/$repo/${file:-.}" "$to"
""",
    "sbatch": r"""
while [[ $1 == --* ]]; do shift; done
SLURM_JOB_ID=77 OPENTAU_ROOT=$PWD exec bash "$@"
""",
    "srun": r"""
while [[ $1 != */node.sh ]]; do shift; done
shift
printf '%s\0' "$@" >"$RECORD"
""",
    "torchrun": r"""
while [[ $1 != opentau_train ]]; do shift; done
shift
printf '%s\0' "$@" >"$RECORD"
""",
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Path:
    """A directory with the repository's launchers, the stand-ins in bin/ and what the Hub has in hub/."""
    root = tmp_path_factory.mktemp("machine")
    (root / "launchers").symlink_to(REPO / "launchers")
    for name, text in STAND_INS.items():
        path = root / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{text}")
        path.chmod(0o755)
    write_droid(root / "hub" / "lerobot" / "droid_1.0.1", lengths=(60, 50, 45, 40))
    write_cosmos(root / "hub" / "nvidia" / "Cosmos3-DROID" / "success", lengths=(60, 50, 45, 40))
    write_cosmos(root / "hub" / "nvidia" / "Cosmos3-DROID" / "failure", "failure")
    (root / "hub" / "KarlP" / "droid").mkdir(parents=True)
    published_filter(root / "hub" / "KarlP" / "droid" / "keep_ranges_1_0_1.json", RANGES)
    return root


def run_block(machine: Path, block: str) -> tuple[str, list[str]]:
    """What the block printed, and the overrides that reached the training program (none where nothing was launched)."""
    record = machine / "record"
    record.unlink(missing_ok=True)
    path = f"{machine / 'bin'}:{on_path.folder()}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment(PATH=path, HUB=str(machine / "hub"), RECORD=str(record), OPENTAU_CACHE=str(machine / "cache"))
    script = block.replace("/data/", f"{machine / 'data'}/")
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=machine, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, (block, done.stdout, done.stderr)
    arguments = record.read_bytes().decode().split("\0")[:-1] if record.exists() else []
    return done.stdout + done.stderr, arguments


@pytest.fixture(scope="module")
def outcomes(machine) -> list[tuple[str, list[str]]]:
    """Of each block of the page, in its order: what it printed and launched."""
    return [run_block(machine, block) for block in BLOCKS]


@pytest.mark.slow
def test_every_block_runs_in_its_order_and_says_what_was_kept(outcomes):
    printed = {block.split()[0] + str(place): text for place, (block, (text, _)) in enumerate(zip(BLOCKS, outcomes))}
    assert len(printed) == 7
    assert "[dry-run] nvidia/Cosmos3-DROID" in printed["hf0"]
    assert "4 episodes (0 wholly idle)" in printed["python2"]
    checks = printed["DROID_ROOT=/data/droid_1.0.13"]
    for text in (
        "success_only keeps 3 of 4 episodes",
        "episodes: 3 of 3 found among 4 keys",
        "droid is success/, droid_failure is failure/",
        "episodes: 4 of 4 found among 5 keys, 0 dropped",
        "windows:  162 of 195 kept",
    ):
        assert text in checks, checks
    assert "droid is success/, and nothing else is read (success_only)" in printed["export6"]
    assert "10000 steps x 8192 = 81920000 samples" in printed["export6"] and "128 ranks" in printed["export6"]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "how"), [(4, "executed"), (5, "sourced"), (6, "SLURM")])
def test_what_a_block_launches_trains(machine, outcomes, place, how, tmp_path, monkeypatch):
    launched = [word for word in outcomes[place][1] if not word.startswith(("resume=", "paths.run_dir="))]
    assert launched[0] == "+recipe=droid_policy" and len(launched) >= 4
    dataset = re.search(r"DATASET_PATH=/data/(\S+)", BLOCKS[place]).group(1)
    monkeypatch.setenv("DROID_ROOT", str(machine / "data" / dataset))
    smaller = [*TINY_POLICY, "trainer.steps=2", "trainer.global_batch_size=8", "trainer.precision=no"]
    smaller += ["data.num_workers=0", "validation.every=2", "validation.max_samples_per_group=4", "logger=none"]
    smaller += ["parallelism.data_parallel_shard_degree=1"]
    rows = metrics(train_here([*launched, *smaller], tmp_path / "run"))
    last = rows[max(rows)]
    assert last["Validation/droid/joint/MSE"] > 0
    assert ("Validation/droid_failure/joint/MSE" in last) == (how == "executed")


def test_the_options_of_every_download_are_those_of_the_real_command():
    helped = subprocess.run(
        [Path(sys.executable).parent / "hf", "download", "--help"], capture_output=True, text=True, env=environment()
    )
    options = {"--include", *re.findall(r" (--[a-z-]+)", " ".join(re.findall("^hf download.*", PAGE, flags=re.M)))}
    assert {"--dry-run", "--local-dir"} <= options and all(option in helped.stdout for option in options)
