"""A column's values of every episode, read from the data files outside the stream: modes, success, statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import pyarrow as pa

from opentau_train.data.lerobot_meta import FileTable
from opentau_train.data.rows import RowError, RowReader
from opentau_train.errors import UserError
from opentau_train.types import EpisodeTable

T = TypeVar("T")


def of_episodes(
    where: str,
    files: FileTable,
    table: EpisodeTable,
    positions: Sequence[int],
    columns: Sequence[str],
    take: Callable[[pa.Table], T],
    *,
    row: int | None = None,
) -> Iterator[tuple[int, T]]:
    """(position, `take` of the episode's rows) for each of `positions`, in their order; of its first (0) or last (-1)
    row only where `row` says so. `where` is the source's path in the configuration.

    Raises `UserError` naming the file of rows that can't be read or, by a `RowError` of `take`, used.
    """
    reader = RowReader(files.path, list(columns))
    try:
        for position in positions:
            file, start = int(table.data_file[position]), int(table.row_start[position])
            length = int(table.length[position])
            if row is not None:
                start, length = start + (length - 1 if row < 0 else 0), 1
            try:
                taken = take(reader.read(file, start, length, int(table.episode_index[position])))
            except RowError as error:
                raise UserError(
                    f"rows can't be read: {error}",
                    where=str(files.path(file)),
                    remedy=f"restore the file, or leave its episodes out with {where}.exclude_episodes",
                ) from error
            yield position, taken
    finally:
        reader.close()
