"""Work on threads: a call's result for another thread, in the background, an iterator that can be interrupted."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Generic, TypeVar

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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
