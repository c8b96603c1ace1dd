"""Signals at the wrong moment: before training, twice within one call, from a terminal that is closed."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from opentau_train.checkpoints import commit
from opentau_train.distributed.stopping import Stop, stop_signals
from opentau_train.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from tests.program import TOY, command, environment

LONG = [*TOY, "trainer.steps=100000", "validation.every=0", "logger=console", "data.num_workers=1"]
CALL = """
import signal, sys, time, zlib
from opentau_train.distributed.stopping import stop_signals
data = bytes(1 << 29)
with stop_signals():
    print("ready", flush=True)
    while True:
        zlib.crc32(data)  # a call that Python's handlers must wait for
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGHUP, EXIT_PREEMPTED), (signal.SIGINT, EXIT_INTERRUPTED)],
)
def test_a_signal_before_training_ends_with_its_code_and_says_that_nothing_is_lost(number, code, tmp_path):
    program = (
        "import opentau_train.cli as c, time; c._compose_and_run = lambda: print('go', flush=True) or time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program}; c.main()"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout.readline() == "go\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert said == f"\nended by {number.name} before training began: there was nothing to save\n"


def test_two_interrupts_within_one_call_end_it():
    process = subprocess.Popen([sys.executable, "-c", CALL], stdout=subprocess.PIPE, env=environment())
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)  # the kernel keeps one of two that arrive at the same time
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == EXIT_INTERRUPTED


def test_signals_have_their_former_handlers_afterwards():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with stop_signals() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.poll() is Stop.PREEMPTED
    assert [signal.getsignal(number) for number in numbers] == before


def test_what_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.poll() is Stop.NONE
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_has_saved(tmp_path):
    run_dir = tmp_path / "run"
    words = [*LONG, f"paths.run_dir={run_dir}", f"paths.cache_dir={tmp_path / 'cache'}"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, command(words), environment())
    shown = b""
    deadline = time.monotonic() + 120
    while b"/100000" not in shown:
        shown += os.read(terminal, 4096)
        assert time.monotonic() < deadline, shown
    os.close(terminal)  # the kernel sends SIGHUP, and writing to the terminal is an error from now on
    _, status = os.waitpid(pid, 0)
    log = (run_dir / "train.log").read_text()
    assert os.waitstatus_to_exitcode(status) == EXIT_PREEMPTED, log
    saved = commit.newest(run_dir / "checkpoints")
    assert saved is not None and f"preempted at step {int(saved.name)}" in log
