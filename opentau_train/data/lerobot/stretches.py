"""State and actions of many episodes, read a stretch of a file at a time: what statistics go through."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.decode.parquet import RowError
from opentau_train.data.lerobot.episodes import StoredEpisodes
from opentau_train.data.lerobot.locate import EpisodeReader
from opentau_train.data.lerobot.rows import Reading, state_and_actions
from opentau_train.data.remote.mirror import mirror_at

STRETCH_ROWS = 2**16
"""Rows of a file that are read together, some megabytes: what is read for each episode takes as long as its numbers."""

Both = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(state [L, S], actions [L, A]) of an episode."""


def read_in_stretches(reading: Reading, ordered: NDArray[np.int64]) -> Iterator[tuple[int, Both]]:
    """(position, its rows) of the episodes at the positions `ordered` [N], by file and row, as long as they stand where
    the metadata say: the first one that doesn't, or can't be read, ends it, and the rest are for others to read."""
    stored = reading.stored
    if not stored.shared_files or mirror_at(stored.data.root) is not None:
        return
    names = [c.name for c in (*reading.state, *reading.actions)]
    reader = EpisodeReader(stored, names, apart=True)
    try:
        for positions in _stretches(stored, ordered):
            try:
                rows = reader.read_stretch(positions)
                if rows is None:
                    return
                state, actions = state_and_actions(rows, reading)
            except RowError:
                return
            start = stored.row_start[positions] - stored.row_start[positions[0]]
            places = zip(positions.tolist(), start.tolist(), stored.table.length[positions].tolist(), strict=True)
            yield from ((p, (state[s : s + n], actions[s : s + n])) for p, s, n in places)
    finally:
        reader.close()


def _stretches(stored: StoredEpisodes, ordered: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Runs of `ordered` that lie in one file, inside of `STRETCH_ROWS`; at least an episode each."""
    file, end = stored.data_file[ordered], stored.row_start[ordered] + stored.table.length[ordered]
    first = 0
    while first < len(ordered):
        limit = stored.row_start[ordered[first]] + STRETCH_ROWS
        beyond = (file[first + 1 :] != file[first]) | (end[first + 1 :] > limit)
        num = 1 + (int(np.argmax(beyond)) if beyond.any() else len(beyond))
        yield ordered[first : first + num]
        first += num
