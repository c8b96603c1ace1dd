"""`--multirun`: a process and a directory a run, one after the other, and an end that says how each one ended."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from opentau_train import cli
from tests import warm
from tests.nightly import at_night
from tests.program import TOY, environment, metrics

SHORT = [*TOY, "trainer.steps=2", "validation.max_samples_per_group=2", "logger=console"]


def sweep(*words: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "opentau_train", "--multirun", *SHORT, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return warm.Popen(command, cwd=cwd, env=environment(**env), text=True, **pipes)


@pytest.mark.slow
def test_each_value_is_a_run_of_its_own_and_one_that_fails_keeps_no_other_from_running(tmp_path):
    done = sweep("optimizer.lr=1e-3,-1,3e-4", "hydra.sweep.dir=here", cwd=tmp_path)
    out, errors = done.communicate(timeout=300)
    assert done.returncode == 2, errors
    assert "optimizer.lr must be greater than 0, got -1.0" in errors and "Traceback" not in errors
    lines = out.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == [str(tmp_path / "here" / str(n)) for n in range(3)]
    assert [line.split()[-1] for line in lines] == [f"optimizer.lr={lr}" for lr in ("0.001", "-1", "0.0003")]
    assert "exit code 2" in lines[1]
    losses = [
        min(row["Validation/Loss"] for row in metrics(tmp_path / "here" / n).values() if "Validation/Loss" in row)
        for n in "02"
    ]
    assert [float(re.search(r"Validation/Loss (\S+)", lines[n])[1]) for n in (0, 2)] == pytest.approx(losses, rel=1e-5)
    assert yaml.safe_load((tmp_path / "here/2/config.yaml").read_text())["optimizer"]["lr"] == 3e-4


@at_night
def test_a_sweep_that_is_asked_to_stop_stops_its_run_which_saves(tmp_path):
    with sweep("seed=0,1", "trainer.steps=100000", "hydra.sweep.dir=here", cwd=tmp_path) as process:
        rows = tmp_path / "here/0/metrics.jsonl"
        limit = time.monotonic() + 120
        while not (rows.is_file() and rows.read_text().count("\n") > 3):
            assert process.poll() is None and time.monotonic() < limit, process.communicate()
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "exit code 75" in out and not (tmp_path / "here/1").exists()
    assert list((tmp_path / "here/0/checkpoints").glob("0*/run.json"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+hparams_search=lr"], "a search is a sweep over several runs"),
        (["seed=1,2"], "add --multirun"),
    ],
)
def test_a_sweep_without_its_flag_is_refused(words, said):
    with pytest.raises(cli.UserError, match=said):
        cli.compose(["+recipe=droid_policy", *words])


def test_a_sweep_under_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["opentau_train", "-m", "+recipe=droid_policy", "seed=1,2"])
    assert cli.answer(cli._compose_and_run) == 2
    assert "NPROC_PER_NODE=N" in capsys.readouterr().err


def test_an_experiment_is_a_recipe_with_changes():
    tree, usual = (cli.compose([words]) for words in ("+experiment=droid_blind", "+recipe=droid_policy"))
    assert tree["data"].pop("blank_images") and not usual["data"].pop("blank_images")
    assert (tree.pop("name"), usual.pop("name")) == ("droid_blind", "droid_policy")
    assert tree == usual
