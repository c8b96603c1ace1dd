"""Rows of episodes that the lanes of a worker share, and windows without pictures cut from them many at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.chunk import next_rows
from opentau_train.data.lerobot.locate import EpisodeReader
from opentau_train.data.lerobot.rows import EpisodeRows, Reading, load_rows
from opentau_train.data.transforms.base import Record

SHARED_BYTES = 64 * 2**20
"""Of rows that no lane is in, kept for the next lane that comes to them."""


class SharedRows:
    """The rows of the episodes that were read last, up to `max_bytes` of them, and the last one whatever it takes. A
    lane keeps those that it is in by itself."""

    def __init__(self, reading: Reading, reader: EpisodeReader, max_bytes: int = SHARED_BYTES):
        self._reading, self._reader, self._max_bytes = reading, reader, max_bytes
        self._rows: OrderedDict[int, tuple[EpisodeRows, int]] = OrderedDict()
        self.num_bytes = self.num_loaded = 0

    def at(self, position: int) -> EpisodeRows:
        """Those of the episode at `position` of the table. Raises `RowError`; nothing is kept then."""
        if position not in self._rows:
            rows = load_rows(self._reader, self._reading, position)
            self._rows[position] = rows, (size := _size(rows))
            self.num_bytes, self.num_loaded = self.num_bytes + size, self.num_loaded + 1
            while self.num_bytes > self._max_bytes and len(self._rows) > 1:
                self.num_bytes -= self._rows.popitem(last=False)[1][1]
        self._rows.move_to_end(position)
        return self._rows[position][0]

    def clear(self) -> None:
        self._rows.clear()
        self.num_bytes = 0


def windows_of(rows: Sequence[EpisodeRows], frames: NDArray[np.int64], chunk_length: int) -> Record | None:
    """The windows at the `frames` [N] of N episodes' rows, without pictures: `state` [N, S] f32, `actions` [N, T, A]
    f32, `action_is_pad` [N, T] bool, `prompts` [N] to choose from and, where there are any, `weight` [N] f32. None
    where a value isn't finite: the window that has it is to be told from the others."""
    if not all(own.finite for own in rows):
        return None
    pairs = list(zip(rows, frames.tolist(), strict=True))
    chunks = [own.actions[f : f + chunk_length] for own, f in pairs]
    past_end = frames + chunk_length - [len(own.actions) for own in rows]
    for i in np.flatnonzero(past_end > 0).tolist():
        chunks[i] = next_rows(rows[i].actions, int(frames[i]), chunk_length)[0]
    actions = np.concatenate(chunks)
    made: Record = {
        "state": np.concatenate([own.state[f : f + 1] for own, f in pairs]),
        "actions": actions.reshape(len(rows), chunk_length, actions.shape[1]),
        "action_is_pad": np.arange(chunk_length) >= chunk_length - past_end[:, None],
        "prompts": [own.prompts[own.prompt_code[f]] if len(own.prompts) > 1 else own.prompts[0] for own, f in pairs],
    }
    weights = [own.weights[f] for own, f in pairs if own.weights is not None]
    return made | ({"weight": np.array(weights, np.float32)} if weights else {})


def _size(rows: EpisodeRows) -> int:
    """Bytes that they take."""
    arrays = [rows.state, rows.actions, rows.prompt_code, rows.seconds, rows.weights, *rows.images.values()]
    return sum(array.nbytes for array in arrays if array is not None)
