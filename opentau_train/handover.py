"""How a call on one thread ended, for another thread to take up."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def outcome(call: Callable[[], T]) -> Future[T]:
    """`call()` made here and now; `result()` of the answer gives what it gave, or raises what it raised."""
    future: Future[T] = Future()
    try:
        future.set_result(call())
    except BaseException as error:
        # Broad, and not to be split: nothing is handled here. Whatever ended it, StopIteration included, is raised
        # again on the thread that asks; a kind left out would end this one and leave that waiting.
        future.set_exception(error)
    return future
