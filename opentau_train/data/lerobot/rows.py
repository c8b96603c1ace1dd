"""Rows of a LeRobot dataset's episodes: what a worker must know to read them; one whole episode, for its windows; and
single columns of many episodes, for control modes, success and statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opentau_train import strangers
from opentau_train.data.decode.images import ImageError
from opentau_train.data.decode.opening import Opener
from opentau_train.data.decode.parquet import RowError, numbers, one_array, texts
from opentau_train.data.lerobot.columns import Column
from opentau_train.data.lerobot.episodes import StoredEpisodes
from opentau_train.data.lerobot.info import is_lfs_pointer, lfs_error
from opentau_train.data.lerobot.locate import EpisodeError, EpisodeReader
from opentau_train.data.lerobot.presence import or_exclude
from opentau_train.data.lerobot.spans import Span
from opentau_train.data.remote.ahead import fetch_ahead
from opentau_train.data.remote.mirror import mirror_at
from opentau_train.errors import UserError
from opentau_train.types import EpisodeTable

T = TypeVar("T")

OneRow = Literal["first", "last"]
"""The row of an episode that stands for it."""
NUM_AHEAD = 256
"""Episodes whose rows are fetched before they are read, where they lie on a server."""


def of_episodes(
    where: str,
    stored: StoredEpisodes,
    positions: Iterable[int],
    columns: Sequence[str],
    take: Callable[[pa.Table], T],
    *,
    row: OneRow | None = None,
    left_out: dict[int, str] | None = None,
) -> Iterator[tuple[int, T]]:
    """(position, `take` of the episode's rows) for each of `positions`, in their order; of its first or last row only
    where `row` says so. `where` is the source's path in the configuration. With `left_out`, an episode whose own rows
    can't be had is noted there, {position: cause}, and passed over.

    Raises `UserError` naming the file of rows that can't be read or, by a `RowError` of `take`, used.
    """
    reader, mirror = EpisodeReader(stored, list(columns), apart=True), mirror_at(stored.data.root)
    if mirror is not None:
        positions = fetch_ahead(positions, lambda p: [(mirror, stored.data.path(int(stored.data_file[p])))], NUM_AHEAD)
    try:
        for position in positions:
            were_read = False
            try:
                rows = reader.read(position) if row is None else reader.read_one(position, last=row == "last")
                were_read = True
                taken = take(rows)
            except RowError as error:
                if left_out is not None and isinstance(error, EpisodeError):
                    left_out[position] = str(error)
                    continue
                path = stored.data.path(int(stored.data_file[position]))
                if is_lfs_pointer(path):
                    raise lfs_error(str(path)) from error
                number = int(stored.table.episode_index[position])
                # Rows that were read are of a file whose other episodes can be had.
                lost = (
                    [number]
                    if were_read
                    else stored.table.episode_index[stored.data_file == stored.data_file[position]]
                )
                raise UserError(
                    f"rows can't be read: {error}",
                    where=f"episode {number}, {path}",
                    remedy=f"restore the file{or_exclude(where, stored, lost)}",
                ) from error
            yield position, taken
    finally:
        reader.close()


@dataclass(frozen=True)
class Reading:
    """What a worker must know to read a dataset; picklable.

    `fps` is the rate of its rows; `timed` says that they have a timestamp column that is needed; `images` {camera: its
    parquet column}; `task_column` is None where rows have no task; `prompt_separator` splits one text into
    alternatives; `state_kept` and `actions_kept` mark the dimensions of their columns that aren't dropped; `places` are
    the directories that files may lie in.
    """

    dataset: str
    root: Path
    stored: StoredEpisodes
    weight_column: str | None
    images: Mapping[str, str]
    cameras: tuple[str, ...]
    state: tuple[Column, ...]
    actions: tuple[Column, ...]
    prompt_columns: tuple[str, ...]
    prompt_separator: str | None
    task_column: str | None
    tasks: Mapping[int, str]
    tolerance_s: float
    fps: float
    timed: bool
    state_kept: NDArray[np.bool_]
    actions_kept: NDArray[np.bool_]
    places: tuple[str, ...]

    @property
    def episodes(self) -> EpisodeTable:
        return self.stored.table

    @property
    def columns(self) -> list[str]:
        """The parquet columns that windows are made of."""
        names = [c.name for c in (*self.state, *self.actions)]
        names += [*self.prompt_columns, *self.images.values()]
        names += [name for name in (self.task_column, self.weight_column) if name is not None]
        return names + (["timestamp"] if self.timed else [])

    def spans(self, position: int) -> dict[str, Span]:
        """{video camera: the frames of the episode at `position`}."""
        return {camera: places.span(position) for camera, places in self.stored.videos.items()}


@dataclass(frozen=True)
class EpisodeRows:
    """The rows of one episode: `state` [L, S] and `actions` [L, A] f32, `seconds` [L] f64 since the episode's
    start in its videos and `weights` [L] f32 (None where nothing needs them), `prompts[prompt_code[f]]` for row f,
    `images` {camera: L encoded images}; `finite` says that no value of state and actions is NaN or infinite."""

    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    seconds: NDArray[np.float64] | None
    prompt_code: NDArray[np.int64]
    prompts: list[tuple[str, ...]]
    images: Mapping[str, pa.Array]
    weights: NDArray[np.float32] | None
    finite: bool


def state_and_actions(rows: pa.Table, reading: Reading) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(state [L, S] f32, actions [L, A] f32): their columns side by side. Raises `RowError`."""
    both = (reading.state, reading.state_kept), (reading.actions, reading.actions_kept)
    state, actions = (_stack(rows, columns)[:, kept] for columns, kept in both)
    return state, actions


def _stack(rows: pa.Table, columns: tuple[Column, ...]) -> NDArray[np.float32]:
    parts = [numbers(rows, c.name, c.width)[:, c.first : c.first + c.dim] for c in columns]
    return np.concatenate(parts, axis=1) if parts else np.zeros((rows.num_rows, 0), np.float32)


def load_rows(reader: EpisodeReader, reading: Reading, position: int) -> EpisodeRows:
    """The rows of the episode at `position` of the table. Raises `RowError` naming the file."""
    rows = reader.read(position)
    try:
        code, prompts = _prompts(rows, reading)
        state, actions = state_and_actions(rows, reading)
        return EpisodeRows(
            state=state,
            actions=actions,
            seconds=row_seconds(rows) if reading.timed else None,
            prompt_code=code,
            prompts=prompts,
            images={camera: one_array(rows.column(column)) for camera, column in reading.images.items()},
            weights=None if reading.weight_column is None else _weights(rows, reading.weight_column),
            finite=bool(np.isfinite(state).all() and np.isfinite(actions).all()),
        )
    except RowError as error:
        path = reading.stored.data.path(int(reading.stored.data_file[position]))
        raise RowError(f"{path}: {error}") from error


def _weights(rows: pa.Table, column: str) -> NDArray[np.float32]:
    """[L] f32. Raises `RowError` for what is no weight."""
    weights = numbers(rows, column, 1)[:, 0]
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise RowError(f"{column} is {weights[wrong[0]]} in row {wrong[0]}: a weight is a number from 0 on")
    return weights


def row_seconds(rows: pa.Table) -> NDArray[np.float64]:
    """[L] f64 times of an episode's rows. Raises `RowError` where they don't rise."""
    seconds = numbers(rows, "timestamp", 1, np.float64)[:, 0]
    wrong = np.flatnonzero(~np.isfinite(seconds) | (np.diff(seconds, prepend=-np.inf) <= 0))
    if len(wrong):
        raise RowError(f"timestamps of an episode must rise: row {wrong[0]} has {seconds[wrong[0]]}")
    return seconds


def check_finite(reading: Reading, state: NDArray[np.float32], actions: NDArray[np.float32]) -> None:
    """Raises `RowError` naming the first value of a window's `state` [S] or `actions` [T, A] that is not finite."""
    both = (state[None], reading.state, reading.state_kept), (actions, reading.actions, reading.actions_kept)
    for values, columns, kept in both:
        wrong = np.argwhere(~np.isfinite(values))
        if len(wrong):
            step, dim = wrong[0].tolist()
            name = np.array([f"{c.name}[{i}]" for c in columns for i in c.dims])[kept][dim]
            raise RowError(f"{name} is {values[step, dim]}, {step} steps on")


def read_prompts(reading: Reading, positions: NDArray[np.int64]) -> Iterator[str]:
    """The texts that windows of the episodes at `positions` may have as prompts, from meta/ where no column has them.
    Raises `UserError`; episodes whose rows can't be had are passed over."""
    if not reading.prompt_columns:
        yield from _clean(list(reading.tasks.values()), reading.prompt_separator)
        return
    for _, combinations in prompts_by_episode(reading, positions):
        for own in combinations:
            yield from own


def prompts_by_episode(reading: Reading, positions: NDArray[np.int64]) -> Iterator[tuple[int, list[tuple[str, ...]]]]:
    """(position, the texts to choose from, of each kind of window) of the episodes at `positions`, from their rows.
    Raises `UserError`; episodes whose rows can't be had are passed over."""
    names = [*reading.prompt_columns, *([reading.task_column] if reading.task_column else [])]
    where, unreadable = f"data.sources.{reading.dataset}", dict[int, str]()
    yield from of_episodes(
        where, reading.stored, positions.tolist(), names, lambda r: _prompts(r, reading)[1], left_out=unreadable
    )


def _prompts(rows: pa.Table, reading: Reading) -> tuple[NDArray[np.int64], list[tuple[str, ...]]]:
    """(code [L], texts by code): rows of an episode share few combinations of texts and task."""
    columns = [_prompt_column(rows, name, reading.tasks) for name in reading.prompt_columns]
    codes = [code for code, _ in columns]
    if reading.task_column:
        codes.append(numbers(rows, reading.task_column, 1, np.int64)[:, 0])
    if not codes:
        return np.zeros(rows.num_rows, np.int64), [()]
    first, code = _combinations(codes)
    prompts = []
    for combination in zip(*(column[first].tolist() for column in codes)):
        own = [known[c] for (_, known), c in zip(columns, combination) if c >= 0]
        chosen = _clean(own, reading.prompt_separator)
        if not chosen and reading.task_column:
            if combination[-1] not in reading.tasks:
                raise RowError(f"{reading.task_column} {combination[-1]} is not in the dataset's tasks")
            chosen = _clean([reading.tasks[combination[-1]]], reading.prompt_separator)
        prompts.append(chosen)
    return code, prompts


def _combinations(columns: list[NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(a row of each of the K combinations of values that `columns` [L] have side by side, in lexical order; [L] which
    one each row has). Column by column: an episode's have one value or few, and `np.unique` of rows sorts bytes."""
    first, code = np.zeros(min(1, len(columns[0])), np.int64), np.zeros(len(columns[0]), np.int64)
    for column in columns:
        if len(column) and (column != column[0]).any():
            values, own = np.unique(column, return_inverse=True)
            _, first, code = np.unique(code * len(values) + own, return_index=True, return_inverse=True)
    return first, code


def _prompt_column(rows: pa.Table, name: str, tasks: Mapping[int, str]) -> tuple[NDArray[Any], list[str]]:
    """`texts` of a column of texts, or of integers, which are places in `tasks`."""
    kind = rows.schema.field(name).type
    if not pa.types.is_integer(kind):
        return texts(rows, name)
    distinct, code = np.unique(numbers(rows, name, 1, np.int64), return_inverse=True)
    unknown = [task for task in distinct.tolist() if task not in tasks]
    if unknown:
        raise RowError(f"{name} {unknown[0]} is not in the dataset's tasks")
    return code.reshape(-1), [tasks[task] for task in distinct.tolist()]


def _clean(texts: list[str], separator: str | None) -> tuple[str, ...]:
    parts = [part for text in texts for part in (text.split(separator) if separator else [text])]
    return tuple(part.strip() for part in parts if part.strip())


def encoded(cell: Any, reading: Reading, opener: Opener) -> bytes:
    """The encoded image of a parquet cell: bytes, or {bytes, path} with one of both."""
    if isinstance(cell, Mapping):
        path = cell.get("path")
        if cell.get("bytes") is None and isinstance(path, str):
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise ImageError(f"its path '{path[:80]}' leads out of the dataset's directory")
            strangers.check_inside(f"{reading.root}/{path}", reading.places)
            return opener(reading.root / path, strangers.read_bytes)
        cell = cell.get("bytes")
    if not isinstance(cell, bytes):
        raise ImageError("it has no image bytes")
    return cell
