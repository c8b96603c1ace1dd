"""Work on threads: a call's result for another thread, an iterator that can be interrupted, calls in the background."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


def settle(call: Callable[[], T], future: Future[T] | None = None) -> Future[T]:
    """Make `call()` here and now, and return a settled future: its `result()` returns or raises what the call did. It
    is `future` where one is given."""
    future = Future() if future is None else future
    try:
        future.set_result(call())
    except BaseException as error:
        # Broad, and not to be split: nothing is handled here. Whatever ended it, StopIteration included, is raised
        # again on the thread that asks; a kind left out would end this one and leave that waiting.
        future.set_exception(error)
    return future


def in_background(call: Callable[[], T], name: str) -> Future[T]:
    """Make `call()` on a new thread called `name`, and return its future. The end of the program doesn't wait for
    it."""
    future: Future[T] = Future()
    threading.Thread(target=settle, args=(call, future), name=name, daemon=True).start()
    return future


CLOSE_SECONDS = 5.0
"""How long an item that nobody will take may keep its iterator from being closed."""


class InterruptibleIterator(Generic[T]):
    """An iterator whose `next` can be given up when a stop is asked for: a read that hangs must not outlive its run.

    The iterator runs on a thread of its own and only on demand, so order and side effects are those of plain `next`;
    `ahead`: from the first `next` on it is always one item ahead, made while the caller works on the one before.
    """

    def __init__(self, iterator: Iterator[T], *, ahead: bool = False):
        self._iterator: Iterator[T] | None = iterator
        self._ahead, self._num_asked = ahead, 0
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Future[T]] = queue.SimpleQueue()
        self._given_up = False
        self._thread = threading.Thread(target=self._serve, name="data", daemon=True)
        self._thread.start()

    def next(self, stop: Callable[[], int]) -> T | None:
        """The next item; None when `stop()` turns true before it is there, after which nothing more may be asked.

        Raises what the iterator raises, StopIteration included.
        """
        self._ask()
        while True:
            try:
                answer = self._answers.get(timeout=0.2)
            except queue.Empty:
                if stop():
                    self._given_up = True
                    return None
                continue
            self._num_asked -= 1
            if self._ahead:
                self._ask()
            return answer.result()

    def _ask(self) -> None:
        if self._num_asked == 0:
            self._num_asked += 1
            self._asked.put(True)

    def close(self) -> None:
        """End the iterator and its thread; one that was given up, or whose next item isn't there in `CLOSE_SECONDS`, is
        left to the end of the process."""
        self._asked.put(False)
        if not self._given_up:
            self._thread.join(CLOSE_SECONDS if self._num_asked else None)

    def _serve(self) -> None:
        assert self._iterator is not None, "one thread serves, once"
        while self._asked.get():
            self._answers.put(settle(partial(next, self._iterator)))
        if isinstance(self._iterator, Generator):
            self._iterator.close()
        self._iterator = None


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
        self._left_out = 0
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
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
            self._left_out += 1
        else:
            self._calls.put(call)

    def close(self, seconds: float) -> bool:
        """Let the thread end after the calls posted so far. Returns whether it did within `seconds`; warns where
        not."""
        self._calls.put(None)
        end = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < end:
            self._thread.join(0.1)  # in short turns: a second Ctrl-C must come through
        if self._thread.is_alive():
            log.warning("%s is not done after %g s and is left behind: %s", self.name, seconds, self.lost)
        elif self._left_out:
            log.warning("%s: %d rows were left out: %s", self.name, self._left_out, self.lost)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Make no more calls, and wait for none."""
        self.failed = True
        self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            if self.failed:
                self._left_out += 1
                continue
            error = settle(call).exception()
            if error is not None:  # of whatever kind: none of a tracker's is worth the training
                self.failed = True
                log.warning(
                    "%s has failed and is left out from here on: %s; %s", self.name, first_line(error), self.lost
                )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
