"""Four orders of a mixture's training windows: in order, one open episode a worker, lanes, uniformly random."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from opentau_train import rng
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.tape import Tape
from opentau_train.data.order.windows import Windows

BATCH, RANKS, WORKERS = 32, 2, 2
NAMES = ("in order", "episode streams", "lanes", "random")

Order = Callable[[int], Windows]
"""The windows of a step's global batch; `slot` names the reader that gives each."""


def make_order(name: str, mixture: Mixture, seed: int) -> Order:
    if name == "lanes":
        return mixture.tape(BATCH).batch
    if name == "in order":
        blocks = [dataclasses.replace(d.train, shuffle=False) for d in mixture.datasets]
        return Tape(blocks, list(mixture.draws), seed=seed, batch_size=BATCH).batch
    if name == "episode streams":
        return episode_streams(mixture, seed)
    return uniform(mixture, seed)


def all_windows(mixture: Mixture) -> np.ndarray:
    """[N, 3] (dataset, episode, frame) of the training windows."""
    rows = []
    for d in mixture.datasets:
        for episode, start, length in zip(d.train.episode, d.train.start, d.train.length, strict=True):
            frame = start + np.arange(length)
            rows.append(np.stack([np.full(length, d.index), np.full(length, episode), frame], axis=1))
    return np.concatenate(rows)


def uniform(mixture: Mixture, seed: int) -> Order:
    every = all_windows(mixture)

    def batch(step: int) -> Windows:
        t = np.arange(step * BATCH, (step + 1) * BATCH)
        passes, place = np.divmod(t, len(every))
        chosen = np.empty((BATCH, 3), np.int64)
        for p in np.unique(passes):
            shuffled = np.argsort(rng.fold(rng.key(seed, "uniform", int(p)), np.arange(len(every))))
            chosen[passes == p] = every[shuffled[place[passes == p]]]
        return Windows(t, 0 * t, chosen[:, 0], passes, chosen[:, 1], chosen[:, 2], 0 * t)

    return batch


def episode_streams(mixture: Mixture, seed: int) -> Order:
    every = all_windows(mixture)
    episodes = np.unique(every[:, :2], axis=0)
    shards: list[list[np.ndarray]] = [[] for _ in range(RANKS * WORKERS)]
    for p in range(8):  # more passes than any run takes
        shuffled = np.argsort(rng.fold(rng.key(seed, "streams", p), np.arange(len(episodes))))
        for place, e in enumerate(shuffled.tolist()):
            mine = every[(every[:, :2] == episodes[e]).all(1)]
            shards[place % len(shards)].append(np.concatenate([mine, np.full((len(mine), 1), p)], axis=1))
    lines = [np.concatenate(shard) for shard in shards]
    share = BATCH // RANKS

    def batch(step: int) -> Windows:
        turn, worker = divmod(step, WORKERS)
        slots = [rank * WORKERS + worker for rank in range(RANKS)]
        rows = np.concatenate([lines[slot][turn * share : (turn + 1) * share] for slot in slots])
        t = np.arange(step * BATCH, (step + 1) * BATCH)
        return Windows(t, np.repeat(slots, share), rows[:, 0], rows[:, 3], rows[:, 1], rows[:, 2], 0 * t)

    return batch
