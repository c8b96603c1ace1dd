"""W&B's own package: offline through the files that it writes, online against a server on this machine."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import time
from importlib import import_module

import numpy as np
import pytest

from opentau_train.errors import UserError
from opentau_train.sinks.jsonl import JsonlSink
from opentau_train.sinks.trackers import run_id
from opentau_train.sinks.wandb import WandbSink
from tests.nightly import at_night
from tests.program import TOY, metrics, run, start
from tests.unit.sinks.curves import check_curves, parts
from tests.unit.sinks.wandb_server import serving

if importlib.util.find_spec("wandb") is None:
    pytest.skip("the W&B tests are left out: the package wandb is not installed", allow_module_level=True)

PROGRAM = [*TOY, "logger=[console,wandb,tensorboard]", "model.width=16"]


@pytest.mark.slow
def test_a_preempted_run_is_one_run_in_wandb_and_tensorboard(tmp_path):
    command = [*PROGRAM, "trainer.steps=6", "validation.every=3", f"paths.run_dir={tmp_path / 'run'}"]
    command += [f"paths.cache_dir={tmp_path / 'cache'}"]
    first = run([*command, "trainer.stop_after=4"], WANDB_MODE="offline")
    second = run([*command, "resume=auto"], WANDB_MODE="offline")
    assert (first.returncode, second.returncode) == (75, 0), first.stderr + second.stderr
    (one, before), (other, after) = parts(tmp_path / "run")
    assert one == other == run_id(tmp_path / "run")
    assert [*before, *after] == [1, 2, 3, 4, 5, 6]
    numbers = metrics(tmp_path / "run")
    for step, row in {**before, **after}.items():
        assert row["Training/Loss"] == numbers[step]["Training/Loss"]
        assert row.get("Validation/Loss") == numbers[step].get("Validation/Loss")
    check_curves(tmp_path / "run", range(1, 7))


@at_night
def test_a_killed_run_goes_on_from_an_older_checkpoint_as_the_same_run(tmp_path):
    run_dir = tmp_path / "run"
    command = [*PROGRAM, "trainer.steps=60", "validation.every=20", "checkpoint.every=20", "data.image_size=[16,16]"]
    command += [f"paths.run_dir={run_dir}", f"paths.cache_dir={tmp_path / 'cache'}"]
    process = start(command, WANDB_MODE="offline")
    lines = run_dir / "metrics.jsonl"
    while not lines.exists() or '"step": 25' not in lines.read_text():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # W&B's own process with it
    process.communicate()
    ended = run([*command, "resume=auto"], WANDB_MODE="offline")
    assert ended.returncode == 0, ended.stderr
    (one, before), (other, after) = parts(run_dir)
    assert one in ("", other) and other == run_id(run_dir)
    # W&B's process writes its file late: what it held is lost with it, and stands in the next part.
    assert [*before] == [*range(1, len(before) + 1)] and [*after] == [*range(1, 61)]
    assert all(before[s]["Training/Loss"] == after[s]["Training/Loss"] for s in before.keys() & after.keys())
    check_curves(run_dir, range(1, 61))


# -- online ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def account(tmp_path, monkeypatch):
    """An API key, and no trace of the machine's own settings. `account(url)` says where the server is."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    yield lambda url: monkeypatch.setenv("WANDB_BASE_URL", url)
    import_module("wandb").teardown()


def tracker(context, seconds: float = 20.0, **settings) -> WandbSink:
    options = {"settings": {"x_file_stream_transmit_interval": 0.1, **settings}}
    return WandbSink(context=context, project="opentau_train", options=options, close_seconds=seconds)


@pytest.mark.slow
def test_a_resumed_online_run_sends_each_step_and_validation_once(make_context, account):
    """Killed at step 5 after the checkpoint of step 3, whose validation a preemption had put off."""
    with serving() as server:
        account(server.url)
        for begin, end in ((0, 5), (3, 7)):
            sink = tracker(make_context(begin))
            if begin == 3:
                sink.write(3, {"Validation/Loss": 30.0})
                sink.image(3, "Validation/actions", np.zeros((4, 4, 3), np.uint8))
            for step in range(begin + 1, end + 1):
                sink.write(step, {"Training/Loss": float(step)})
                if step in (3, 6) and begin != 0:
                    sink.write(step, {"Validation/Loss": 10.0 * step})
            sink.close()
        rows = server.rows
        assert server.runs == {run_id(make_context().run_dir)}
    assert [r["Training/Loss"] for r in rows if "Training/Loss" in r] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["_step"] for r in rows] == sorted({r["_step"] for r in rows})
    validated = [(r["Validation/Step"], r["Validation/Loss"]) for r in rows if "Validation/Loss" in r]
    assert validated == [(3, 30), (6, 60)]


@pytest.mark.slow
def test_a_resumed_online_run_sends_what_a_kill_left_unsent(make_context, account):
    with serving() as server:
        account(server.url)
        steps = {1: {"Training/Loss": 1.0}, 2: {"Training/Loss": 2.0, "Validation/Loss": 20.0}}
        for begin, unsent in ((0, {3: {"Training/Loss": 3.0}, 4: {"Validation/Loss": 40.0}}), (4, {})):
            jsonl, sink = JsonlSink(context=make_context(begin)), tracker(make_context(begin))
            for step, row in steps.items():
                sink.write(step, row)
            for step, row in {**steps, **unsent}.items():
                jsonl.write(step, row)
            jsonl.close()
            sink.close()
            steps = {5: {"Training/Loss": 5.0}}
        found = [(r.get("Training/Loss"), r.get("Validation/Loss")) for r in server.rows]
    assert found == [(1, None), (2, 20), (3, None), (None, 40), (5, None)]


@pytest.mark.slow
def test_a_new_run_without_a_key_is_told_at_once(make_context, account, monkeypatch):
    account("http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY")
    with open(os.devnull) as nobody, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", nobody)  # no terminal to ask for one
        with pytest.raises(UserError, match=r"(?s)No API key.*logger\.wandb\n.*wandb login.*mode=offline"):
            tracker(make_context())


@pytest.mark.slow
def test_a_resumed_run_goes_on_offline_where_the_server_is_not_reached(make_context, account, tmp_path, caplog):
    account("http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        sink = tracker(make_context(4), init_timeout=1)
        sink.write(5, {"Training/Loss": 0.5})
        sink.close()
    import_module("wandb").teardown()  # its process has written all that it holds
    assert "goes on offline" in caplog.text and "wandb sync" in caplog.text
    assert [[*rows] for _, rows in parts(tmp_path) if rows] == [[5]]


@pytest.mark.slow
def test_a_directory_that_wandb_cannot_write_is_an_error(make_context, account, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "wandb").write_text("in the way")
    with pytest.raises(UserError, match=r"(?s)wandb.*where"):
        tracker(make_context())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=[pytest.mark.distributed, pytest.mark.nightly])])
def test_training_outlives_the_server(ranks, tmp_path, account):
    """It is gone from the first step on: the run ends with 0, after `close_seconds`, and its rows are on the disk."""
    with serving(goes_down=True) as server:
        account(server.url)
        command = [*TOY, "logger=[console,wandb]", "logger.wandb.close_seconds=4", "trainer.steps=20"]
        command += ["trainer.log_every=1", "validation.every=0", "checkpoint.every=0", "data.image_size=[16,16]"]
        ended = run([*command, f"paths.run_dir={tmp_path / 'run'}"], ranks)
        assert ended.returncode == 0 and server.runs and not server.rows, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    ((_, rows),) = parts(tmp_path / "run")
    assert rows.keys() == metrics(tmp_path / "run").keys() == {*range(1, 21)}


@pytest.mark.distributed
def test_two_ranks_without_a_key_end_with_one_message(tmp_path, account, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    ended = run([*TOY, "logger=wandb", "trainer.steps=2", f"paths.run_dir={tmp_path / 'run'}"], ranks=2)
    said = ended.stderr
    assert ended.returncode == 1 and said.count("  error: ") == 1, said
    assert said.count("Traceback") == 1 and "ChildFailedError" in said, "there is none but torchrun's"
    assert "No API key" in said and "remedy: wandb login" in said
