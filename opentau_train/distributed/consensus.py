"""What all ranks must know of each other before a step: counts, stops, errors. It travels between their CPUs.

The device is neither asked nor waited for: it works on the step before. Ranks form a binary tree, because a ring of N
would take 2 (N - 1) hops, and every one of them has a connection to another that breaks when its process is gone: that
is a Python error here, which `rollcall` explains, also where the gradients travel by NCCL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opentau_train.distributed.stopping import Stop
from opentau_train.distributed.world import World
from opentau_train.errors import Explained

TAG = 0x0907E
"""The tag of the votes' messages: no other point-to-point message of the program has it."""

BROKEN = float("nan")
"""Sent in place of every sum when a rank is gone."""


@dataclass(frozen=True)
class Vote:
    """What one rank tells the others before a step.

    `counts` {term: supervised loss elements of its samples}; `num_substituted`, how many of its samples stand in for
    windows that couldn't be read, and `num_cut`, how many have a prompt that was cut; `num_tokens`, those of its
    samples, where the policy packs, and `num_micro_batches` of them; `error`, what ended its stream; `has_batch` False:
    it gave up waiting for its data, because of `stop`; `has_written`: all that it had to write of a checkpoint in the
    background.
    """

    counts: Mapping[str, float]
    num_substituted: int = 0
    num_cut: int = 0
    num_tokens: int = 0
    num_micro_batches: int = 1
    error: Explained | None = None
    has_batch: bool = True
    has_written: bool = False
    stop: Stop = Stop.NONE

    def pack(self) -> torch.Tensor:
        """[K + 9] float64: the counts, and what `Ballot.result` reads behind them, all to be added over ranks but the
        last one, of which the largest counts."""
        preempted, interrupted = (self.stop is stop for stop in (Stop.PREEMPTED, Stop.INTERRUPTED))
        flags = self.error is not None, not self.has_batch, self.has_written, preempted, interrupted
        numbers = self.num_substituted, self.num_cut, self.num_tokens, *flags, self.num_micro_batches
        return torch.tensor([*self.counts.values(), *numbers], dtype=torch.float64)


@dataclass(frozen=True)
class Agreement:
    """What the votes of all ranks come to, the same on each. `counts` {term: supervised loss elements of the global
    batch}; `num_substituted` windows, `num_cut` prompts and `num_tokens` in it; the most `num_micro_batches` of a rank;
    `stop`: the highest that any rank was asked for; `take_step`: every rank has its part of the batch; `all_written`:
    every rank has written."""

    counts: dict[str, float]
    num_substituted: int
    num_cut: int
    num_tokens: int
    num_micro_batches: int
    stop: Stop
    take_step: bool
    all_written: bool


class Ballot:
    """One vote of all ranks. Making it and its `result` are collective; what other ranks send may come in between."""

    def __init__(self, vote: Vote, world: World):
        self._vote, self._world = vote, world
        self._sums = vote.pack()
        children = range(2 * world.rank + 1, 2 * world.rank + 3)
        self._children = [rank for rank in children if rank < world.size]
        self._parent = (world.rank - 1) // 2 if world.rank else None
        self._parts = [torch.empty_like(self._sums) for _ in self._children]
        self._arriving = [_sure(dist.irecv(part, rank, tag=TAG)) for part, rank in zip(self._parts, self._children)]
        self._leaving: list[dist.Work] = []

    def result(self) -> Agreement:
        """Wait for the agreement. Raises on all ranks the first rank's error, if any has one, and what a broken
        collective raises where a rank is gone."""
        if self._world.size > 1:
            self._travel()
        terms = list(self._vote.counts)
        counts = dict(zip(terms, self._sums.tolist()))
        *nums, failed, absent, written, preempted, interrupted, most = self._sums[len(terms) :].tolist()
        if failed:
            raise next(error for error in self._world.gather(self._vote.error) if error is not None)
        stop = Stop.INTERRUPTED if interrupted else Stop.PREEMPTED if preempted else Stop.NONE
        bad, cut, tokens = map(int, nums)
        return Agreement(counts, bad, cut, tokens, int(most), stop, not absent, written == self._world.size)

    def _travel(self) -> None:
        """Up the tree, adding (of the last number the larger one stays), and the sums down again. A rank that sees a
        neighbour gone tells the others: each would otherwise learn of it only when its own neighbour has ended."""
        up = [] if self._parent is None else [self._parent]
        try:
            for part, work in zip(self._parts, self._arriving):
                work.wait()
                self._sums = torch.cat([(self._sums + part)[:-1], torch.maximum(self._sums, part)[-1:]])
            for parent in up:
                _sure(dist.isend(self._sums, parent, tag=TAG)).wait()
                dist.recv(self._sums, parent, tag=TAG)
        except RuntimeError:
            self._sums = torch.full_like(self._sums, BROKEN)
            self._tell([*self._children, *up])
            raise
        self._tell(self._children)
        if self._sums.isnan().any():
            raise dist.DistNetworkError("a rank is gone: another one has lost its connection to it")
        for work in self._leaving:
            work.wait()

    def _tell(self, ranks: list[int]) -> None:
        """Send the sums, without waiting for a rank that may no longer listen."""
        for rank in ranks:
            try:
                self._leaving.append(_sure(dist.isend(self._sums, rank, tag=TAG)))
            except RuntimeError:
                continue  # it is gone: the next vote, or its own children, will tell


def _sure(work: dist.Work | None) -> dist.Work:
    assert work is not None, "every rank is in the group of all"
    return work
