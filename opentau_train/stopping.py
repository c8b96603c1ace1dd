"""How a run is asked to stop: signals set a flag, the flag travels with the step's all-reduce, all ranks stop alike."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StopFlag:
    """0 = go on, 1 = preempted (SIGTERM, SIGUSR1, SIGUSR2), 2 = interrupted (Ctrl-C)."""

    code: int = 0


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Signals set a flag that travels with the step's all-reduce, so all ranks stop after the same step. A second
    Ctrl-C ends at once."""
    flag = StopFlag()

    def preempt(number: int, frame: object) -> None:
        flag.code = max(flag.code, 1)

    def interrupt(number: int, frame: object) -> None:
        if flag.code == 2:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        flag.code = 2
        sys.stderr.write("\nstopping after this step and saving; press Ctrl-C again to end at once\n")

    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: preempt, signal.SIGUSR1: preempt, signal.SIGUSR2: preempt}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
