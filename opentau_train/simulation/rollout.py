"""Episodes of a policy in one environment: which rank and which simulator runs each, and what comes of them.

Episode e runs in slot e mod S of its rank, S being the number of simulators of a rank, and in that row of the policy's
batch. So an episode's actions are the same bits for any number of ranks: its start, its noise and its place in a batch
of S rows depend on e alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from opentau_train import rng
from opentau_train.config.bounds import Count, at_least, positive
from opentau_train.simulation.environment import declared
from opentau_train.simulation.pool import TRIES, Pool
from opentau_train.simulation.simulator import Moved, Seen


@dataclass(frozen=True)
class Rollouts:
    """`episodes` of each environment from starts that `seed` says, `horizon` steps of a chunk being taken before the
    next is sampled; `simulators` of a rank run at a time, `timeout` seconds are the longest that an answer of one may
    take; the first `videos` episodes are filmed."""

    episodes: Count = 20
    seed: int = 0
    horizon: Count = 8
    simulators: Count = 4
    timeout: Annotated[float, positive] = 120.0
    videos: Annotated[int, partial(at_least, low=0)] = 2

    def check(self, path: str) -> None:
        """Each value is bounded by itself."""


def start_seed(seed: int, episode: int) -> int:
    """Of an episode's start: [0, 2^31), which no demonstration has but by chance."""
    return rng.key(seed, "rollout", episode) >> 33


def owned(episodes: int, slots: int, rank: int, size: int) -> list[list[int]]:
    """The episodes of each of a rank's `slots`, in their order, of all ranks' together each exactly once: ranks take
    blocks of `slots` episodes in turn."""
    blocks = [e for e in range(episodes) if e // slots % size == rank]
    return [blocks[slot::slots] for slot in range(slots)]


@dataclass
class _Slot:
    """One simulator's episodes: the one that runs is the first of `queue`; `tries` simulators were lost over it."""

    queue: list[int]
    seen: Seen | None = None
    num_steps: int = 0
    tries: int = 0
    frames: list[dict[str, NDArray[np.uint8]]] = field(default_factory=list)


class Running:
    """This rank's episodes of the environment `name`, all of whose simulators take a chunk's steps at the same time.

        while running.active:
            seen, keys = running.observations()
            running.take(chunks)

    `results` [E, 3] f64: of its own episodes whether the goal was reached, the number of steps, and 1, others' being 0;
    `films` {episode: what the cameras saw at each step}. Raises the `UserError`s of the environment, and `Fault` where
    an episode loses its simulator `TRIES` times. Close it.
    """

    def __init__(self, name: str, tree: Mapping[str, Any], rollouts: Rollouts, rank: int, size: int):
        self.rollouts, self.environment = rollouts, declared(tree, name)
        self.results = np.zeros((rollouts.episodes, 3))
        self.films: dict[int, list[dict[str, NDArray[np.uint8]]]] = {}
        queues = owned(rollouts.episodes, rollouts.simulators, rank, size)
        self._slots = [_Slot(queue) for queue in queues]
        self._pool = Pool(dict(tree), sum(bool(queue) for queue in queues), rollouts.timeout)
        self._begin(self._active())

    @property
    def active(self) -> bool:
        """Whether any of the rank's episodes is left."""
        return bool(self._active())

    @property
    def num_lost(self) -> int:
        """How many simulators were replaced."""
        return self._pool.lost

    def observations(self) -> tuple[list[Seen], list[int]]:
        """What each slot sees, and the 64-bit key of what is drawn there. A slot without an episode repeats another's
        observation, so that there are always `simulators` rows. Only while `active`."""
        seen = [slot.seen for slot in self._slots]
        other = next(s for s in seen if s is not None)
        keys = [
            rng.fold_one(rng.key(self.rollouts.seed, "policy", slot.queue[0]), slot.num_steps) if slot.queue else 0
            for slot in self._slots
        ]
        return [other if s is None else s for s in seen], keys

    def take(self, chunks: NDArray[np.float32]) -> None:
        """Take the first steps of each slot's chunk ([S, T, A] in the environment's units), and begin the episodes that
        are next."""
        most, horizon = self.environment.max_steps, self.rollouts.horizon
        calls: dict[int, tuple[Any, ...]] = {}
        for i in self._active():
            num = min(horizon, most - self._slots[i].num_steps)
            calls[i] = ("act", chunks[i, :num], self._filmed(i))
        begin = []
        for i, moved in self._pool.ask(calls).items():
            if moved is None:
                self._lost(i)
                begin.append(i)
            elif self._moved(i, moved):
                begin.append(i)
        self._begin([i for i in begin if self._slots[i].queue])

    def close(self) -> None:
        self._pool.close()

    def _active(self) -> list[int]:
        return [i for i, slot in enumerate(self._slots) if slot.queue]

    def _filmed(self, i: int) -> bool:
        return self._slots[i].queue[0] < self.rollouts.videos

    def _begin(self, slots: Sequence[int]) -> None:
        """Begin the slots' first episodes."""
        while slots:
            calls = {i: ("reset", start_seed(self.rollouts.seed, self._slots[i].queue[0])) for i in slots}
            answers = self._pool.ask(calls)
            for i, seen in answers.items():
                slot = self._slots[i]
                slot.seen, slot.num_steps, slot.frames = seen, 0, [] if seen is None else [seen.images]
                if seen is None:
                    self._lost(i)
            slots = [i for i, seen in answers.items() if seen is None]

    def _lost(self, i: int) -> None:
        self._slots[i].tries += 1
        if self._slots[i].tries == TRIES:
            raise self._pool.given_up()

    def _moved(self, i: int, moved: Moved) -> bool:
        """Note what came of a slot's steps; whether its episode is over."""
        slot = self._slots[i]
        slot.seen, slot.num_steps = moved.seen, slot.num_steps + moved.num_steps
        slot.frames += moved.frames
        if not moved.over:
            return False
        episode = slot.queue.pop(0)
        self.results[episode] = moved.success, slot.num_steps, 1
        if episode < self.rollouts.videos:
            self.films[episode] = slot.frames
        slot.tries = 0
        return True
