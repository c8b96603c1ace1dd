"""Calls on a thread that nothing waits for: a tracker's."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from opentau_train.threads import first_line, settle

log = logging.getLogger(__name__)

T = TypeVar("T")

THREAD = "tracker "
"""How the threads' names begin. A thread that is alive after `close` hangs: the program then ends without waiting for
it."""


LIMIT = 10_000
"""Calls that may wait. More are left out, so that a tracker that hangs fills no memory."""


class Background:
    """Makes the calls that it is given on one thread, in their order.

    The first failure is logged as a warning, and the calls after it are left out; `lost` says there what that means.
    """

    def __init__(self, name: str, lost: str):
        self.name, self.lost = name, lost
        self.failed = False
        self.left_out = 0
        self._calls: queue.SimpleQueue[Callable[[], object] | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=THREAD + name, daemon=True)
        self._thread.start()

    def ask(self, call: Callable[[], T], seconds: float) -> T:
        """The result of `call()`. Raises what it raises, and TimeoutError after `seconds`."""
        answers: queue.SimpleQueue[Future[T]] = queue.SimpleQueue()
        self._calls.put(lambda: answers.put(settle(call)))
        try:
            answer = answers.get(timeout=seconds)
        except queue.Empty as error:
            raise TimeoutError(f"no answer in {seconds:g} s") from error
        return answer.result()

    def post(self, call: Callable[[], object]) -> None:
        """Make `call` when the ones before it are done; returns at once."""
        if self.failed or self._calls.qsize() >= LIMIT:
            self.left_out += 1
        else:
            self._calls.put(call)

    def drain(self, seconds: float) -> None:
        """Wait until the calls posted so far are done or left out, for at most `seconds`."""
        reached = threading.Event()
        self._calls.put(reached)
        reached.wait(seconds)

    def close(self, seconds: float) -> bool:
        """Let the thread end after the calls posted so far. Returns whether it did within `seconds`; warns where
        not."""
        self._calls.put(None)
        end = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < end:
            self._thread.join(0.1)  # in short turns: a second Ctrl-C must come through
        if self._thread.is_alive():
            log.warning("%s is not done after %g s and is left behind: %s", self.name, seconds, self.lost)
        elif self.left_out:
            log.warning("%s: %d rows were left out: %s", self.name, self.left_out, self.lost)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Make no more calls, and wait for none."""
        self.failed = True
        self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            if isinstance(call, threading.Event):
                call.set()
                continue
            if self.failed:
                self.left_out += 1
                continue
            error = settle(call).exception()
            if error is not None:  # of whatever kind: none of a tracker's is worth the training
                self.failed = True
                log.warning(
                    "%s has failed and is left out from here on: %s; %s", self.name, first_line(error), self.lost
                )
