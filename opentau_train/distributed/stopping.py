"""How a run is asked to stop: signals, or a file named PREEMPT in the run directory.

    SIGTERM, SIGUSR1, SIGUSR2, SIGHUP, RUN/PREEMPT  ->  preempted: save and exit with EXIT_PREEMPTED
    SIGINT                                          ->  interrupted: save and exit with EXIT_INTERRUPTED

Before there is anything to save they end the process with these codes at once. The file is for what torchrun doesn't
hand on to its workers, and for people: `touch RUN/PREEMPT`. A rank only raises its own flag here; the vote before each
step makes it everyone's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from opentau_train.errors import EXIT_FAULT, EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED

SENTINEL = "PREEMPT"
"""Its presence in the run directory asks the run to stop."""

MARKER = "PREEMPTED"
"""Written into the run directory when a run has saved and stopped for a preemption: a launcher that sees only
torchrun's own exit code knows by it that the job wants to be started again."""

POLL = 1.0
"""Seconds between two looks at the file, so that a fast loop doesn't burden a file server."""


class Stop(IntEnum):
    """Whether a run was asked to stop before its last step; of two requests the higher one counts."""

    NONE = 0
    PREEMPTED = 1
    INTERRUPTED = 2

    @property
    def exit_code(self) -> int:
        """The process's exit code, for when everything is saved."""
        return {Stop.NONE: EXIT_OK, Stop.PREEMPTED: EXIT_PREEMPTED, Stop.INTERRUPTED: EXIT_INTERRUPTED}[self]


@dataclass
class StopFlag:
    """The stop that this process was asked for. `sentinel`: the file to look for, None until the run directory is
    known."""

    code: Stop = Stop.NONE
    sentinel: Path | None = None
    _looked: float = field(default=float("-inf"), repr=False)

    def poll(self) -> Stop:
        """The stop asked for, after a look at the file unless the last one was less than `POLL` seconds ago."""
        now = time.monotonic()
        if self.sentinel is not None and now - self._looked >= POLL:
            self._looked = now
            if self.sentinel.exists():
                self.code = max(self.code, Stop.PREEMPTED)
        return self.code

    def watch(self, run_dir: Path, *, clear: bool) -> None:
        """Look for the file in `run_dir` from now on; `clear` removes what an earlier start left there."""
        if clear:
            (run_dir / SENTINEL).unlink(missing_ok=True)
            (run_dir / MARKER).unlink(missing_ok=True)
        self.sentinel = run_dir / SENTINEL


def mark_preempted(run_dir: Path, step: int) -> None:
    """Leave the marker for the launcher. Call it when the checkpoint of `step` is whole."""
    (run_dir / MARKER).write_text(json.dumps({"step": step}) + "\n")


class Stopped(Exception):
    """A piece of work was left unfinished, on all ranks alike, because a stop was asked for."""

    def __init__(self, code: int):
        self.code = Stop(code)
        super().__init__(f"stopped: {self.code.name.lower()}")


PREEMPTING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def end_on_signals() -> None:
    """Until `stop_signals`, signals end the process with their codes: it has nothing to save yet."""
    for number in (signal.SIGINT, *PREEMPTING):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has SIGHUP ignored
            signal.signal(number, _end_early)


AGENT = "TORCHELASTIC_RUN_ID"
"""A variable that torchrun sets for its ranks."""
FOLLOWING = "agent"
"""The thread that looks for the agent."""
LOOK_SECONDS, ORPHAN_SECONDS = 1.0, 20.0


def end_with_agent() -> None:
    """A rank of torchrun whose agent is gone is preempted, as nobody else can stop it now and a new start may follow:
    it saves with the others, if that works within `ORPHAN_SECONDS`, and ends. To be called as early as can be: an
    agent that goes before isn't missed. Further calls do nothing."""
    if AGENT in os.environ and not any(thread.name == FOLLOWING for thread in threading.enumerate()):
        threading.Thread(target=_follow, args=(os.getppid(),), name=FOLLOWING, daemon=True).start()


def _follow(agent: int) -> None:
    while os.getppid() == agent and not _is_no_agent(agent):
        time.sleep(LOOK_SECONDS)
    with suppress(OSError):  # what it wrote to may be gone too
        os.write(2, b"\nerror: torchrun's agent is gone: this rank saves and ends; go on with resume=auto\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)
    os._exit(EXIT_FAULT)


def _is_no_agent(parent: int) -> bool:
    """Whether the parent is the machine's first process and runs no Python: who started this one was gone before."""
    with suppress(OSError):
        return parent == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes()
    return False


def _end_early(number: int, frame: object) -> None:
    code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED
    if os.environ.get("RANK", "0") == "0":
        text = f"\nended by {signal.Signals(number).name} before training began: there was nothing to save\n"
        with suppress(OSError):  # of a terminal that is gone
            os.write(2, text.encode())
    os._exit(code)


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """While inside, signals set the yielded flag. A second Ctrl-C ends the process at once, also where the main thread
    is in a call that takes long. What a terminal that is closed was to show is dropped."""
    flag = StopFlag()
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def preempt(number: int, frame: object) -> None:
        flag.code = max(flag.code, Stop.PREEMPTED)
        if number == signal.SIGHUP:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in terminals:  # to write to it would be an error from now on
                os.dup2(nowhere, terminal)
            os.close(nowhere)

    def interrupt(number: int, frame: object) -> None:
        flag.code = Stop.INTERRUPTED
        sys.stderr.write("\nstopping after this step and saving; press Ctrl-C again to end at once\n")

    handlers = {signal.SIGINT: interrupt, **dict.fromkeys(PREEMPTING, preempt)}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        del handlers[signal.SIGHUP]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    with _second_interrupt_ends():
        try:
            yield flag
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is _end_early else handler)


@contextmanager
def _second_interrupt_ends() -> Iterator[None]:
    """While inside, a thread counts the signals as they arrive: Python's own handlers run once for two that come within
    one call of the main thread, and only after it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def count() -> None:
        interrupts = 0
        while numbers := os.read(reader, 64):
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                os._exit(EXIT_INTERRUPTED)
        os.close(reader)

    threading.Thread(target=count, name="signals", daemon=True).start()
    former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        os.close(writer)
