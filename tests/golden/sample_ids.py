"""The golden order: a hash of the first 1,000,000 sample ids of a fixed mixture. No generator of a library is in it."""

import hashlib

import numpy as np

from opentau_train.data.order.blocks import DatasetBlocks, draws_per_epoch
from opentau_train.data.order.tape import VERSIONS, Tape

NUM = 1_000_000
STEP = 50_000


def tape(version: int) -> Tape:
    """Three datasets: many short episodes with a keyframe every 30 frames, several blocks an episode at a stride, and a
    small one that repeats."""
    number = np.arange(1, 2001)

    def blocks(name: str, length: np.ndarray, per_episode: int, stride: int) -> DatasetBlocks:
        place = np.arange(len(length))
        episode, part = place // per_episode, place % per_episode
        columns = (episode.astype(np.int32), (part * 1000).astype(np.int32), length.astype(np.int32))
        return DatasetBlocks(name, *columns, episode.astype(np.int64) * 3 + 1, stride=stride)

    datasets = [
        blocks("short", number * 7919 % 211 + 1, 1, 1),
        blocks("ranges", number[:600] * 104729 % 97 + 1, 3, 2),
        blocks("small", number[:5] * 31, 1, 1),
    ]
    frames = [np.arange(0, length, 30) for length in datasets[0].length.tolist()]
    ends = np.cumsum([len(f) for f in frames])
    datasets[0] = datasets[0].entered_at(ends, np.concatenate(frames).astype(np.int32), reach=0)
    draws = draws_per_epoch([d.num_windows for d in datasets], [None, None, 0.1])
    return Tape(datasets, draws, seed=42, batch_size=256, version=version)


def make() -> list[dict]:
    """Of each version of the order {version, num, digest}: what the golden file holds."""
    return [_of_version(version) for version in VERSIONS]


def _of_version(version: int) -> dict:
    order, state = tape(version), hashlib.blake2b(digest_size=16)
    for first in range(0, NUM, STEP):
        found = order.windows(np.arange(first, first + STEP))
        columns = (found.dataset, found.pass_index, found.episode, found.frame)
        state.update(np.ascontiguousarray(np.stack(columns, axis=1), "<i8").tobytes())
    return {"version": version, "num": NUM, "digest": state.hexdigest()}
