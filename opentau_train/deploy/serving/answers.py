"""One thread that answers all clients' requests: those that wait become batches of one kind."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train.deploy.latency import noise
from opentau_train.deploy.serving.requests import Request, Terms
from opentau_train.errors import Explained, Fault

log = logging.getLogger(__name__)


class Busy(Explained, RuntimeError):
    """More requests wait than may."""


@dataclass(frozen=True)
class Answer:
    """A chunk `actions` [T, A'] f32 in the robot's units; how long it was `waited` for and `computed`, in seconds, in a
    batch of `batch_size`."""

    actions: NDArray[np.float32]
    waited: float
    computed: float
    batch_size: int


@dataclass(frozen=True)
class _Waiting:
    request: Request
    future: Future[Answer] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


def failed(error: Exception) -> Fault:
    """What a client is told of an error that isn't its own: not what the server looks like inside."""
    what = f"the server failed: {type(error).__name__}"
    return Fault(what, where="the server", remedy="its log says more; try again")


class Answers:
    """Computes the chunks of requests, in the order in which they come; what waits meanwhile is one batch, as far as it
    is of the first one's kind, of at most `terms.max_batch`. Of a batch each request fails by itself.

    At most `max_waiting` requests wait. `healthy` is false after a failure that no client is to blame for, until a
    batch succeeds.
    """

    def __init__(self, terms: Terms, max_waiting: int):
        self.terms, self.max_waiting, self.healthy = terms, max_waiting, True
        self.num_answered = self.num_batches = 0
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="answers", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Answer]:
        """The answer to come; cancel it where nobody waits for it any more. Raises `Busy`."""
        with self._changed:
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.future.cancelled())
            if len(self._waiting) >= self.max_waiting:
                raise Busy(
                    f"the server is busy: {len(self._waiting)} requests wait",
                    where="the server",
                    remedy="ask again later, or raise its max_waiting or max_batch",
                )
            waiting = _Waiting(request)
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting.future

    def warm_up(self) -> None:
        """Compute a chunk of each robot: the first one takes longer, and what can't act at all fails here."""
        policy = self.terms.policy
        for head, robot in policy.robots.items():
            policy.act(noise(policy, robot), norm_head=head, steps=self.terms.steps)

    def close(self, seconds: float) -> bool:
        """End the thread after the batch that it computes; what waits is given up. Returns whether it did so in
        `seconds`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    for waiting in self._waiting:
                        waiting.future.cancel()
                    return
                group = self._next()
            self._answer(group)

    def _next(self) -> list[_Waiting]:
        """Takes the first request and those of its kind, in their order."""
        kind = self._waiting[0].request.kind
        group: list[_Waiting] = []
        others: deque[_Waiting] = deque()
        for waiting in self._waiting:
            alike = len(group) < self.terms.max_batch and waiting.request.kind == kind
            (group if alike else others).append(waiting)
        self._waiting = others
        return [waiting for waiting in group if waiting.future.set_running_or_notify_cancel()]

    def _answer(self, group: Sequence[_Waiting]) -> None:
        """Settles the futures of requests of one kind."""
        ready = []
        for waiting in group:
            try:
                reader = self.terms.policy.readers[waiting.request.norm_head]
                ready.append((waiting, reader.read(waiting.request.observation)))
            except Exception as error:  # broad: whatever it is, its client is told, and no other; see `_failed`
                self._failed([waiting], error)
        if not ready:
            return
        try:
            self._compute(ready)
        except Exception as error:  # broad: whatever it is, the clients whose batch it was are told; see `_failed`
            if len(ready) == 1 or not isinstance(error, Explained) or isinstance(error, Fault):
                self._failed([waiting for waiting, _ in ready], error)
            else:  # one of them can't be computed: the others can, each by itself
                for waiting, _ in ready:
                    self._answer([waiting])

    def _compute(self, ready: Sequence[tuple[_Waiting, dict[str, Any]]]) -> None:
        """One batch, whose observations have been read. Raises what the policy does for any of them; limits are looked
        at for each by itself."""
        policy, first, start = self.terms.policy, ready[0][0].request, time.monotonic()
        seeds = [waiting.request.seed for waiting, _ in ready]
        batch = policy.batch([read for _, read in ready], first.norm_head, seeds)
        chunks = policy.sample(batch.to(policy.device), first.steps).float().cpu()
        computed = time.monotonic() - start
        self.num_batches += 1
        self.healthy = True
        for row, (waiting, _) in enumerate(ready):
            one = slice(row, row + 1)
            try:
                actions = policy.in_units(chunks[one], batch.rows(one), self.terms.limits)[0]
            except Explained as error:
                waiting.future.set_exception(error)
                continue
            self.num_answered += 1
            waiting.future.set_result(Answer(actions, start - waiting.since, computed, len(ready)))

    def _failed(self, group: Sequence[_Waiting], error: Exception) -> None:
        """Tell the clients. Broad, and not to be split: of whatever kind an error is, the thread that all clients share
        must go on, and nobody may wait for ever. What isn't explained is logged whole."""
        if isinstance(error, Explained) and not isinstance(error, Fault):
            told: Exception = error
        else:
            self.healthy = False
            log.error("a batch of %d failed", len(group), exc_info=error)
            told = failed(error)
        for waiting in group:
            if not waiting.future.done():
                waiting.future.set_exception(told)
