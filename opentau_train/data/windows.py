"""Which windows there are, and which episodes are held out. Pure: arrays in, arrays out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from opentau_train import rng
from opentau_train.data.tape import DatasetBlocks
from opentau_train.errors import UserError
from opentau_train.types import EpisodeTable

SNAP_ROWS = 1e-2
"""A step this near to a row is that row: float32 timestamps and rates such as 29.97 don't meet rows exactly."""


def validation_split(
    name: str, numbers: NDArray[np.int64], ratio: float, seed: int, chosen: tuple[int, ...] | None = None
) -> NDArray[np.bool_]:
    """[E] True for held-out episodes: hash of (seed, dataset, episode number) below `ratio`.

    Each episode decides for itself: adding datasets or episodes moves none of the others. With `ratio` > 0 at least
    one episode is held out (the one with the smallest hash) as long as one remains for training; with 1.0 all are.
    `chosen` names the held-out episodes instead. Raises `UserError` for one that isn't there.
    """
    if chosen is not None:
        missing = sorted(set(chosen) - set(numbers.tolist()))
        if missing:
            raise UserError(
                f"episode {missing[0]} can't be held out: it is not among the {len(numbers)} episodes in use",
                where=f"data.sources.{name}.val_episodes",
                remedy="name episodes of the dataset that `episodes` and `exclude_episodes` leave in",
            )
        return np.isin(numbers, chosen)
    if ratio == 1.0:
        return np.ones(len(numbers), bool)
    if ratio <= 0 or len(numbers) < 2:
        return np.zeros(len(numbers), bool)
    draw = rng.uniform(rng.fold(rng.key(seed, "split", name), numbers))[:, 0]
    held_out = draw < ratio
    if not held_out.any():
        held_out[np.argmin(draw)] = True
    if held_out.all():
        held_out[np.argmax(draw)] = False
    return held_out


def row_step(native_fps: float, fps: float | None) -> float:
    """Rows between two steps of a chunk taken at `fps`; 1.0 where that is the dataset's own rate (or None)."""
    return 1.0 if fps is None else native_fps / fps


def chunk_rows(chunk_length: int, step: float) -> int:
    """Rows that a chunk reaches over, its first row included, when its steps are `step` rows apart."""
    return math.ceil((chunk_length - 1) * step - SNAP_ROWS) + 1


def chunk_places(
    frame: int, chunk_length: int, step: float, seconds: NDArray[np.float64] | None = None, fps: float | None = None
) -> NDArray[np.float64]:
    """[T] f64 places between the rows of an episode, of the steps of the chunk at row `frame`: `step` rows apart, or
    with `seconds` [L], the rows' times, 1 / `fps` seconds apart. Places after the last row lie beyond L - 1."""
    steps = np.arange(chunk_length)
    if seconds is None or fps is None or len(seconds) < 2:
        place = frame + steps * step
    else:
        end = seconds[-1] + chunk_length / fps + 1.0
        rows = np.arange(len(seconds) + 1, dtype=np.float64)
        rows[-1] = rows[-2] + (end - seconds[-1]) * fps * step  # a line on, so that what is after the end stays there
        place = np.interp(seconds[frame] + steps / fps, np.append(seconds, end), rows)
    nearest = np.rint(place)
    return np.where(np.abs(place - nearest) <= SNAP_ROWS, nearest, place)


def rows_at(
    values: NDArray[np.float32], place: NDArray[np.float64], held: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(values [T, A] f32 at the places [T] between the rows of `values` [L, A], is_pad [T]).

    Linear between two rows; the dimensions under `held` [A] (flags, counts) keep the earlier row's. Places after the
    last row take it and are marked.
    """
    last = len(values) - 1
    is_pad = place > last
    place = np.minimum(place, last)
    low = np.floor(place).astype(np.int64)
    share = (place - low).astype(np.float32)[:, None]
    if not share.any():
        return values[low], is_pad
    if held is not None:
        share = np.where(held, np.float32(0), share)
    return values[low] * (1 - share) + values[np.minimum(low + 1, last)] * share, is_pad


def next_rows(values: NDArray[np.float32], row: int, num: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """`rows_at` for the `num` T rows of `values` [L, A] from `row` on: (a copy [T, A] f32, is_pad [T])."""
    found = values[row : row + num]
    if len(found) == num:
        return found.copy(), np.zeros(num, bool)
    return np.concatenate([found, np.repeat(found[-1:], num - len(found), axis=0)]), np.arange(num) >= len(found)


def history_rows(
    frame: int,
    history: int,
    step: float = 1.0,
    seconds: NDArray[np.float64] | None = None,
    fps: float | None = None,
) -> NDArray[np.int64]:
    """[h+1] rows of the images of the window at `frame`, oldest first: the nearest to `step` rows apart, or with
    `seconds` [L], the rows' times, to 1 / `fps` seconds apart (the later one in the middle of two); never before the
    episode's start."""
    steps = np.arange(history, -1, -1)
    if seconds is None or fps is None:
        place = frame - np.rint(steps * step)
    else:
        place = np.interp(seconds[frame] - steps / fps, seconds[: frame + 1], np.arange(frame + 1))
        place = np.minimum(np.floor(place + 0.5 + SNAP_ROWS), frame)
    return np.maximum(place, 0).astype(np.int64)


def make_blocks(
    name: str,
    table: EpisodeTable,
    source_blocks: NDArray[np.int32],
    keep: NDArray[np.bool_],
    *,
    rows: int,
    drop_tail: bool,
    shuffle: bool,
    stride: int = 1,
    made_of: Mapping[str, str] | None = None,
) -> DatasetBlocks:
    """The source's blocks of the episodes under `keep` [E], cut to windows that may start; `source_blocks` [N, 3] int32
    (position in the table, first frame, length).

    With `drop_tail` a window's chunk, which reaches over `rows` rows, must lie inside its episode, so the last
    `rows - 1` frames start none. With `stride` k only every k-th frame of a block starts one, its first being one.
    """
    episode, start, length = (source_blocks[:, i].astype(np.int32) for i in range(3))
    if drop_tail:
        last = table.length[episode] - rows + 1
        length = np.minimum(length, last - start)
    length = -(-length // stride)
    chosen = keep[episode] & (length > 0)
    return DatasetBlocks(
        name=name,
        episode=episode[chosen],
        start=start[chosen],
        length=length[chosen].astype(np.int32),
        number=table.episode_index[episode[chosen]],
        shuffle=shuffle,
        stride=stride,
        made_of=made_of or {},
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
        frame = block.frames(np.repeat(order, length), np.arange(length.sum()) - np.repeat(first, length))
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
