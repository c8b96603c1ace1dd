"""Which windows there are, and which episodes are held out. Pure: arrays in, arrays out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opentau_train import rng
from opentau_train.data.tape import DatasetBlocks
from opentau_train.types import EpisodeTable


def validation_split(name: str, numbers: NDArray[np.int64], ratio: float, seed: int) -> NDArray[np.bool_]:
    """[E] True for held-out episodes: hash of (seed, dataset, episode number) below `ratio`.

    Each episode decides for itself: adding datasets or episodes moves none of the others. With `ratio` > 0 at least
    one episode is held out (the one with the smallest hash) as long as one remains for training.
    """
    if ratio <= 0 or len(numbers) < 2:
        return np.zeros(len(numbers), bool)
    draw = rng.uniform(rng.fold(rng.key(seed, "split", name), numbers))[:, 0]
    held_out = draw < ratio
    if not held_out.any():
        held_out[np.argmin(draw)] = True
    if held_out.all():
        held_out[np.argmax(draw)] = False
    return held_out


def make_blocks(
    name: str,
    table: EpisodeTable,
    source_blocks: NDArray[np.int32],
    keep: NDArray[np.bool_],
    *,
    chunk_length: int,
    drop_tail: bool,
    shuffle: bool,
) -> DatasetBlocks:
    """The source's blocks of the episodes under `keep` [E], cut to windows that may start.

    With `drop_tail` a window's chunk must lie inside its episode, so the last `chunk_length - 1` frames start none.
    """
    episode, start, length = (source_blocks[:, i].astype(np.int32) for i in range(3))
    if drop_tail:
        last = table.length[episode] - chunk_length + 1
        length = np.minimum(length, last - start)
    chosen = keep[episode] & (length > 0)
    return DatasetBlocks(
        name=name,
        episode=episode[chosen],
        start=start[chosen],
        length=length[chosen].astype(np.int32),
        number=table.episode_index[episode[chosen]],
        shuffle=shuffle,
    )


def validation_windows(
    blocks: list[DatasetBlocks], group_of: list[NDArray[np.int64]], max_per_group: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(dataset, episode position, frame) [N] of every window to validate, in reading order.

    `group_of` gives each dataset's group per episode position. With `max_per_group` a group keeps a systematic
    sample: windows floor(i * n / m) of its n in order, so the same ones whatever the ranks.
    """
    columns = []
    for d, block in enumerate(blocks):
        order = np.lexsort((block.start, block.number))
        length = block.length[order].astype(np.int64)
        first = np.cumsum(length) - length
        frame = np.arange(length.sum()) - np.repeat(first - block.start[order], length)
        columns.append(np.stack([np.full(len(frame), d), np.repeat(block.episode[order], length), frame]))
    dataset, episode, frame = np.concatenate(columns, axis=1) if columns else np.zeros((3, 0), np.int64)
    if max_per_group is None or not len(dataset):
        return dataset, episode, frame
    group = np.concatenate([group_of[d][columns[d][1]] for d in range(len(blocks))])
    keep = np.zeros(len(dataset), bool)
    for g in np.unique(group):
        members = np.flatnonzero(group == g)
        num = min(max_per_group, len(members))
        keep[members[np.arange(num) * len(members) // num]] = True
    return dataset[keep], episode[keep], frame[keep]


def equal_spans(cost: NDArray[np.float64], parts: int) -> NDArray[np.int64]:
    """[parts + 1] bounds of contiguous spans of about equal total `cost` [N] (each span within one item of its
    share)."""
    ends = np.cumsum(cost)
    total = ends[-1] if len(ends) else 0.0
    inner = np.searchsorted(ends - cost / 2, total * np.arange(1, parts) / parts)
    return np.concatenate([[0], inner, [len(cost)]]).astype(np.int64)
