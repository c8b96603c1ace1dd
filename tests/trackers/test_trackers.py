"""A run of six steps, stopped after four and resumed, in each tracker's own package, read back as that package does."""

import json
import os
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from opentau_train.sinks.trackers import run_id
from tests.program import REPO, TOY, metrics

pytestmark = pytest.mark.trackers

STEPS = range(1, 7)
HELD_OUT = (3, 6)


def train(run_dir: Path, tracker: str, *words: str, **environment: str) -> None:
    """Six steps with two validations, stopped in between."""
    command = [sys.executable, "-m", "opentau_train", *TOY, "trainer.steps=6", "validation.every=3"]
    command += [f"logger={tracker}", f"paths.run_dir={run_dir}", f"paths.cache_dir={run_dir.parent / 'cache'}", *words]
    env = {**os.environ, "HOME": str(run_dir.parent), "PYTHONPATH": str(REPO), **environment}
    for more, code in ((["trainer.stop_after=4"], 75), (["resume=auto"], 0)):
        ended = subprocess.run([*command, *more], env=env, cwd=run_dir.parent, capture_output=True, text=True)
        assert ended.returncode == code, ended.stderr
        assert "can't be started" not in ended.stderr and "is left out from here on" not in ended.stderr, ended.stderr


@pytest.mark.parametrize("store", [pytest.param("file", marks=pytest.mark.nightly), "sqlite"])
def test_mlflow_has_one_run_with_each_steps_numbers_and_the_configuration(store, tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}" if store == "sqlite" else (tmp_path / "mlruns").as_uri()
    run_dir = tmp_path / "droid"
    train(run_dir, "mlflow", MLFLOW_TRACKING_URI=uri, MLFLOW_ALLOW_FILE_STORE="true")
    code = (
        "import json, mlflow; client = mlflow.MlflowClient();"
        "experiment = client.get_experiment_by_name('opentau_train');"
        "(run,) = client.search_runs([experiment.experiment_id]); names = ['Training/Loss', 'Validation/Loss'];"
        "print(json.dumps([run.info.run_id, run.info.run_name, run.data.params,"
        "{n: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, n)] for n in names}]))"
    )
    env = {**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_FILE_STORE": "true"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    number, name, parameters, found = json.loads(said.splitlines()[-1])
    rows = metrics(run_dir)
    assert number == (run_dir / "mlflow_run_id").read_text() and name == "droid"
    assert parameters["trainer.steps"] == "6" and parameters["model.width"] == "32"
    assert dict(found["Training/Loss"]) == {n: pytest.approx(rows[n]["Training/Loss"]) for n in STEPS}
    assert dict(found["Validation/Loss"]) == {n: pytest.approx(rows[n]["Validation/Loss"]) for n in HELD_OUT}


def test_trackio_has_each_steps_numbers(tmp_path):
    run_dir = tmp_path / "droid"
    train(run_dir, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as opened:
        found = opened.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, _, _ in found} == {f"droid-{run_id(run_dir)[:8]}"}
    rows = metrics(run_dir)
    losses = {
        step: numbers["Training/Loss"] for _, step, text in found if "Training/Loss" in (numbers := json.loads(text))
    }
    assert losses == {n: pytest.approx(rows[n]["Training/Loss"]) for n in STEPS}


def test_comet_writes_archives_offline_of_one_experiment(tmp_path):
    run_dir = tmp_path / "droid"
    there = {"COMET_OFFLINE_DIRECTORY": str(tmp_path / "comet")}
    train(run_dir, "comet_ml", "logger.comet_ml.options.online=false", **there)
    archives = sorted((tmp_path / "comet").glob("*.zip"), key=lambda path: path.stat().st_mtime)
    assert len(archives) == 2 and all(2 * run_id(run_dir) in path.name for path in archives)
    losses: dict[int, float] = {}
    for archive in archives:
        with zipfile.ZipFile(archive) as opened:
            lines = map(json.loads, opened.read("messages.json").splitlines())
            sent = [line["payload"]["metric"] for line in lines if line["payload"].get("metric")]
            losses |= {m["step"]: float(m["metricValue"]) for m in sent if m["metricName"] == "Training/Loss"}
    rows = metrics(run_dir)
    assert losses == {n: pytest.approx(rows[n]["Training/Loss"]) for n in STEPS}
