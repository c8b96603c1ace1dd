"""One writer a run directory: others are refused and told who it is; one that is gone is followed."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from opentau_train.checkpoints import lock as module
from opentau_train.checkpoints.lock import Lock, RunDirLost
from opentau_train.errors import UserError
from tests.program import REPO, environment

HOLD = """
import os, sys, time
from pathlib import Path
from opentau_train.checkpoints.lock import Lock
lock = Lock(Path(sys.argv[1]))
if sys.argv[2:] == ["child"] and os.fork() == 0:
    time.sleep(1.0)
    os._exit(0)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """start(*arguments) -> another process that holds the lock of `tmp_path/run`."""
    started = []

    def start(*arguments):
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), *arguments]
        process = subprocess.Popen(command, cwd=REPO, env=environment(), stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(params=["flock", "no_flock"])
def system(request, monkeypatch):
    """Waits are short; the file server has the system's locks, or not."""
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(module, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.1)
    if request.param == "no_flock":

        def refuse(*arguments):
            raise OSError("No locks available")

        monkeypatch.setattr(module.fcntl, "flock", refuse)
    return request.param


def from_elsewhere(path):
    """The lock's file as a launch on another machine has it."""
    told = json.loads(path.read_text())
    return told | {"machine": "another", "host": "node7", "process": 1}


def test_a_second_writer_is_refused_and_told_who_holds_it(system, tmp_path):
    first = Lock(tmp_path / "run")
    with pytest.raises(UserError) as refused:
        Lock(tmp_path / "run")
    assert f", process {os.getpid()}, since 20" in refused.value.what and sys.argv[0] in refused.value.what
    assert str(tmp_path / "run") in refused.value.where
    first.check()
    first.release()
    Lock(tmp_path / "run").release()
    assert not (tmp_path / "run").exists(), "a directory with nothing else in it goes"


def test_what_else_is_in_the_directory_stays(tmp_path):
    lock = Lock(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").touch()
    lock.release()
    assert os.listdir(tmp_path / "run") == ["config.yaml"]


@pytest.mark.slow
def test_a_killed_holder_is_followed_at_once(system, holder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALE_SECONDS", 600.0)  # not waited for
    process = holder()
    process.send_signal(signal.SIGKILL)
    process.wait()
    lock = Lock(tmp_path / "run")
    lock.check()
    lock.release()


@pytest.mark.slow
def test_the_children_of_a_killed_holder_are_waited_for(holder, tmp_path):
    process = holder("child")
    process.send_signal(signal.SIGKILL)
    process.wait()
    Lock(tmp_path / "run").release()


def test_a_holder_on_another_machine_that_lives_is_seen_by_its_count(system, tmp_path):
    path = tmp_path / "run" / "lock"
    path.parent.mkdir()
    Lock(tmp_path / "other").release()
    mark = Lock(tmp_path / "other")
    told = from_elsewhere(mark.path)
    mark.release()
    done = threading.Event()

    def live():
        for count in range(10**6):
            path.write_text(json.dumps(told | {"count": f"{count:012d}"}))
            if done.wait(0.02):
                return

    path.write_text(json.dumps(told))
    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(UserError, match="another run is writing this run directory"):
        Lock(tmp_path / "run")
    done.set()
    thread.join()
    lock = Lock(tmp_path / "run")  # now its count stands still
    lock.check()
    lock.release()


@pytest.mark.parametrize("how", ["removed", "replaced", "moved", "taken"])
def test_a_directory_that_is_this_runs_no_more_is_noticed(how, tmp_path):
    run_dir = tmp_path / "run"
    lock = Lock(run_dir)
    if how == "taken":
        lock.path.write_text(json.dumps(from_elsewhere(lock.path) | {"token": "another"}))
    else:
        os.rename(run_dir, tmp_path / "moved")
        if how == "replaced":
            other = Lock(run_dir)
    with pytest.raises(RunDirLost, match="node7" if how == "taken" else "run directory"):
        lock.check()
    lock.release()
    if how == "replaced":
        other.check()
        other.release()


def test_a_file_server_that_does_not_answer_takes_no_directory_away(tmp_path, monkeypatch):
    lock = Lock(tmp_path / "run")

    def fail(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "stat", fail)
        lock.check()
    with monkeypatch.context() as patch:
        patch.setattr(module.Path, "read_text", fail)
        lock.check()
    lock.release()


def test_the_count_rises_while_it_is_held(system, tmp_path):
    lock = Lock(tmp_path / "run")
    before, end = json.loads(lock.path.read_text())["count"], time.monotonic() + 30
    while json.loads(lock.path.read_text() or "{}").get("count", before) == before:
        assert time.monotonic() < end
        time.sleep(0.01)
    lock.release()
