"""The batches that a pass reads on each rank, in step where a sharded model needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train.batch import Batch, blank_batch
from opentau_train.config.settings import ValidationSettings
from opentau_train.data.load.stream import Parts, loader
from opentau_train.distributed.parallel import Replicas
from opentau_train.distributed.stopping import StopFlag, Stopped
from opentau_train.distributed.watchdog import Progress
from opentau_train.distributed.world import World
from opentau_train.errors import BadSample, UserError
from opentau_train.models.policy import Policy
from opentau_train.threads import InterruptibleIterator
from opentau_train.validation.plan import ValidationPlan

NOTHING = np.zeros(0, np.int64)


@contextmanager
def evaluating(policy: Policy, replicas: Replicas) -> Iterator[None]:
    """The policy in evaluation mode, back in its own mode afterwards and, where sharded, back in its shards."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)
        replicas.reshard()


class Rounds:
    """This rank's batches of a plan, as pairs (batch of exactly `plan.batch_size` rows, `t` [n] of its first n rows).

    `stop` asks the rank to leave out the rest; `place` is told of every batch, for the watchdog. A sharded model's
    forward is a collective: every rank then gets as many rounds as the busiest one, the missing ones blank, and all
    leave in the same round, which costs one small all-reduce a round.
    """

    def __init__(
        self,
        plan: ValidationPlan,
        replicas: Replicas,
        world: World,
        settings: ValidationSettings,
        stop: StopFlag | None,
        place: Progress | None,
    ):
        self.plan, self.world, self.sharded = plan, world, replicas.sharded
        self.stop, self.place = stop or StopFlag(), place or Progress()
        self.skip_bad = settings.on_bad_sample == "skip"
        self.error: UserError | None = None
        self.halted = False
        self.left_out: list[BadSample] = []

    def __iter__(self) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
        plan, rank, data = self.plan, self.world.data_rank, self.plan.mixture.settings
        parts = Parts(
            plan.mixture,
            lambda worker, width: plan.for_worker(rank, worker, width),
            train=False,
            skip_bad=self.skip_bad,
        )
        own = plan.num_rounds_of(rank)
        with closing(InterruptibleIterator(iter(loader(parts, data.num_workers, data.prefetch_factor)))) as batches:
            for number in range(plan.num_rounds if self.sharded else own):
                self.place.enter("validation")
                part = batches.next(self.stop.poll) if number < own else None
                self.error = part.error if part is not None else None
                self.halted = self.error is not None or self.stop.poll() > 0
                if self.sharded:
                    self.halted = bool(self.world.sum(torch.tensor([float(self.halted)])).item())
                if self.halted:
                    break
                self.left_out += part.left_out if part is not None else ()
                batch, t = (None, NOTHING) if part is None else (part.batch, part.t)
                if batch is not None or self.sharded:
                    batch = (batch or blank_batch(plan.mixture.spec)).filled_up(plan.batch_size)
                    yield batch.to(self.world.device), t
        self.place.enter("all-reduce of the validation")

    def outcome(self) -> torch.Tensor:
        """[4] float64 for the pass's all-reduce: this rank failed, stopped with code 1 or 2, and left windows out."""
        stopped = self.error is None and self.halted
        flags = [self.error is not None, stopped and self.stop.code == 1, stopped and self.stop.code == 2]
        return torch.tensor([*map(float, flags), float(len(self.left_out))], dtype=torch.float64)

    def settle(self, outcome: torch.Tensor) -> tuple[BadSample, ...]:
        """All ranks' left-out windows, given the summed `outcome`. Raises on all the first failed rank's error, or
        `Stopped` where any left the pass."""
        failed, preempted, interrupted, num_left_out = outcome.tolist()
        if failed:
            raise next(e for e in self.world.gather(self.error) if e is not None)
        if preempted or interrupted:
            raise Stopped(2 if interrupted else 1)
        if not num_left_out:
            return ()
        return tuple(bad for found in self.world.gather(self.left_out) for bad in found)
