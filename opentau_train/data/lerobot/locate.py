"""Where an episode's rows are: where the metadata place them, or, if that isn't so, where the files have them.

A row belongs to the episode of its `episode_index` and has its place there by its `frame_index`, wherever it stands.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opentau_train.data.decode.parquet import RowError, RowReader, numbers, one_array
from opentau_train.data.lerobot.episodes import StoredEpisodes
from opentau_train.data.remote.mirror import mirror_at, opener_at

EPISODE_COLUMN = "episode_index"
INDEXED_FILES = 16
_NO_ROWS = np.zeros(0, np.int64), np.zeros(0, np.int64)


def row_keys(stored: StoredEpisodes) -> list[str]:
    """The columns that tell a row's episode and its place there."""
    return [EPISODE_COLUMN] + ([stored.order] if stored.order else [])


class EpisodeError(RowError):
    """The rows of one episode can't be had; the others of its file can."""


class EpisodeReader:
    """Reads `columns` of one whole episode at a time, in the order of its frames; `apart`, beside others on threads of
    their own. Its methods raise `RowError`.

    Rows that stand where the metadata say are read from there. Else the file's own columns tell where they are, then
    those of the other files that may have them: an episode may lie in two, or in another than the metadata say.
    """

    def __init__(self, stored: StoredEpisodes, columns: Sequence[str], *, apart: bool = False):
        self._stored = stored
        self._keys = row_keys(stored)
        self._mirror = mirror_at(stored.data.root)
        self._reader = RowReader([*self._keys, *columns], opener_at(stored.data.root), apart=apart)
        self._indices: OrderedDict[Path, _FileIndex] = OrderedDict()
        self._listing: list[Path] | None = None
        self._ranges: dict[Path, tuple[int, int]] = {}

    def read(self, position: int) -> pa.Table:
        """All rows of the episode at `position` of the table."""
        stored = self._stored
        file, length = int(stored.data_file[position]), int(stored.table.length[position])
        number, path = int(stored.table.episode_index[position]), stored.data.path(file)
        try:
            rows = self._at_place(path, file, int(stored.row_start[position]), length, number)
            if rows is not None:
                return rows
        except RowError as error:
            if self._exists(path) or not stored.shared_files:
                raise
            try:
                return self._search(path, number, length)
            except EpisodeError:
                if self.is_anywhere(position):
                    raise
                raise error from None  # what is missing is the file
        return self._search(path, number, length)

    def _at_place(self, path: Path, file: int, start: int, length: int, number: int) -> pa.Table | None:
        """The `length` rows from `start` on of a file, by rising frame; None if they aren't just those of episode
        `number`."""
        rows = self._reader.slice(path, start, length)
        frames = self._frames(rows, number)
        if frames is None or len(frames) != length:
            return None
        if self._reader.num_rows(path) != int(self._stored.rows_in_file[file]):
            beside = [self._reader.slice(path, row, 1) for row in (start - 1, start + length) if row >= 0]
            if any(row.num_rows and self._frames(row, number) is not None for row in beside):
                return None
        if (np.diff(frames) == 1).all():
            return rows
        if len(np.unique(frames)) == length:
            return rows.take(pa.array(np.argsort(frames))).combine_chunks()
        return None

    def read_stretch(self, positions: NDArray[np.int64]) -> pa.Table | None:
        """The rows of a file from the first of the episodes at `positions` to the last, which the metadata place there
        one after another; None if one of them isn't just there."""
        stored = self._stored
        file, lengths = int(stored.data_file[positions[0]]), stored.table.length[positions].astype(np.int64)
        path, start = stored.data.path(file), stored.row_start[positions]
        rows = self._reader.slice(path, int(start[0]), int(start[-1] + lengths[-1] - start[0]))
        ends = np.cumsum(lengths)
        own = np.repeat(start - start[0] - ends + lengths, lengths) + np.arange(ends[-1])
        if self._reader.num_rows(path) != int(stored.rows_in_file[file]) or own[-1] >= rows.num_rows:
            return None
        numbers = np.repeat(stored.table.episode_index[positions], lengths)
        frames = _order(rows, stored.order)[own]
        rises = np.diff(frames, prepend=0) == 1
        rises[ends - lengths] = True  # from one episode to the next they may do what they like
        good = (_whole(rows, EPISODE_COLUMN)[own] == numbers) & rises & (frames >= 0)
        return rows if good.all() else None

    def read_one(self, position: int, *, last: bool) -> pa.Table:
        """The first or last row of the episode at `position` of the table."""
        stored = self._stored
        file, length = int(stored.data_file[position]), int(stored.table.length[position])
        number, frame = int(stored.table.episode_index[position]), length - 1 if last else 0
        path = stored.data.path(file)
        if stored.order == "frame_index" and self._exists(path):
            row = self._reader.slice(path, int(stored.row_start[position]) + frame, 1)
            if self._frames(row, number) == [frame]:
                return row
        return self.read(position).slice(frame, 1)

    def count(self, position: int) -> int:
        """How many frames the episode at `position` of the table has in the files, whatever the metadata say."""
        path = self._stored.data.path(int(self._stored.data_file[position]))
        parts = self._gather(path, int(self._stored.table.episode_index[position]), enough=None)
        return len(np.unique(np.concatenate([frames for _, _, frames in parts]))) if parts else 0

    def is_anywhere(self, position: int) -> bool:
        """Whether a file has rows of the episode at `position` of the table."""
        try:
            return self.count(position) > 0
        except RowError:
            return False

    def close(self) -> None:
        self._reader.close()
        self._indices.clear()

    def _frames(self, rows: pa.Table, number: int) -> NDArray[np.int64] | None:
        """[N] the frame of each row, by the row's place where no column tells it; None if a row is of another episode
        than `number`, or has no frame."""
        if not (_whole(rows, EPISODE_COLUMN) == number).all():
            return None
        frames = _order(rows, self._stored.order)
        return frames if (frames >= 0).all() else None

    def _search(self, path: Path, number: int, length: int) -> pa.Table:
        """The `length` rows of episode `number`, which the metadata place in the file `path`."""
        parts = self._gather(path, number, enough=length)
        if not parts:
            raise EpisodeError(f"{path}: no rows of episode {number}, here or in another file")
        frames = np.concatenate([frames for _, _, frames in parts])
        order = np.argsort(frames, kind="stable")
        again = np.diff(frames[order], prepend=-1) == 0
        if (num := len(frames) - int(again.sum())) != length:
            raise EpisodeError(f"{path}: episode {number} has {num} rows, the metadata give it {length}")
        rows = pa.concat_tables([self._reader.take(file, places) for file, places, _ in parts])
        rows = rows.take(pa.array(order)).combine_chunks()
        twice = np.flatnonzero(again)
        differs = [place for place in twice.tolist() if not rows.slice(place, 1).equals(rows.slice(place - 1, 1))]
        if differs:
            raise EpisodeError(
                f"{path}: frame {frames[order][differs[0]]} of episode {number} is there twice, differently"
            )
        return rows.take(pa.array(np.flatnonzero(~again))).combine_chunks()

    def _gather(
        self, path: Path, number: int, enough: int | None
    ) -> list[tuple[Path, NDArray[np.int64], NDArray[np.int64]]]:
        """[(file, numbers of its rows of the episode, their frames)], until there are `enough` different frames."""
        parts: list[tuple[Path, NDArray[np.int64], NDArray[np.int64]]] = []
        for file in self._files_near(path):
            try:
                least, greatest = self._extremes(file)
                places, frames = self._index(file).of(number) if least <= number <= greatest else _NO_ROWS
            except RowError:
                if file == path:
                    raise
                continue  # that one costs its own episodes
            if len(places):
                parts.append((file, places, frames))
            if enough is not None and parts and len(np.unique(np.concatenate([f for _, _, f in parts]))) >= enough:
                break
        return parts

    def _files_near(self, path: Path) -> Iterator[Path]:
        """The file itself, then, if files hold several episodes, all others, the nearest first, a later one before an
        earlier one."""
        if self._exists(path) or not self._stored.shared_files:
            yield path
        if not self._stored.shared_files:
            return
        if self._listing is None:
            self._listing = self._stored.data.on_disk()
        later = [p for p in self._listing if p > path]
        earlier = [p for p in self._listing if p < path][::-1]
        for i in range(max(len(later), len(earlier))):
            yield from (side[i] for side in (later, earlier) if i < len(side))

    def _extremes(self, path: Path) -> tuple[int, int]:
        """The least and the greatest episode of a file, asked for once; (0, -1) where no row says its episode."""
        if path not in self._ranges:
            numbers = _whole(self._reader.whole(path, [EPISODE_COLUMN]), EPISODE_COLUMN)
            numbers = numbers[numbers >= 0]
            self._ranges[path] = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, -1)
        return self._ranges[path]

    def _exists(self, path: Path) -> bool:
        """Whether there is the file, here or on the server."""
        return path.exists() if self._mirror is None else path in self._mirror

    def _index(self, path: Path) -> _FileIndex:
        index = self._indices.get(path)
        if index is None:
            index = self._indices[path] = _FileIndex(self._reader.whole(path, self._keys), self._stored.order)
            if len(self._indices) > INDEXED_FILES:
                self._indices.popitem(last=False)
        self._indices.move_to_end(path)
        return index


class _FileIndex:
    """The rows of one file by episode and frame, without those that lack either: 16 bytes a row."""

    def __init__(self, rows: pa.Table, order: str | None):
        episode, frame = _whole(rows, EPISODE_COLUMN), _order(rows, order)
        row = np.lexsort((frame, episode))
        row = row[(episode[row] >= 0) & (frame[row] >= 0)]
        self._frame, self._row = frame[row], row.astype(np.int64)
        self._episode, self._first = np.unique(episode[row], return_index=True)

    def of(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(numbers [N] of the rows of the episode, by rising frame; their frames [N])."""
        place = int(np.searchsorted(self._episode, number))
        if place == len(self._episode) or self._episode[place] != number:
            return _NO_ROWS
        end = self._first[place + 1] if place + 1 < len(self._first) else len(self._row)
        return self._row[self._first[place] : end], self._frame[self._first[place] : end]


def _order(rows: pa.Table, column: str | None) -> NDArray[np.int64]:
    return np.arange(rows.num_rows) if column is None else _whole(rows, column)


def _whole(rows: pa.Table, column: str) -> NDArray[np.int64]:
    """[L] the numbers of an index column; -1 where a row has none: null, not finite, negative or a fraction. Such a row
    is nobody's, and costs its own episode alone."""
    array = one_array(rows.column(column))
    if pa.types.is_signed_integer(array.type) and not array.null_count:
        return np.maximum(array.to_numpy(), -1).astype(np.int64)
    if array.null_count and (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        absent = np.asarray(array.is_null())
        array = array.fill_null(0)
    else:
        absent = np.zeros(len(array), bool)
    values = numbers(pa.table({column: array}), column, 1, np.float64)[:, 0]
    good = np.isfinite(values) & (values >= 0) & (values == np.floor(values)) & ~absent
    return np.where(good, values, -1).astype(np.int64)
