"""The metadata of a LeRobot dataset: episodes, tasks, and where the files are."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.lerobot.columns import CAMERA
from opentau_train.data.lerobot.files import FileTable, distinct_pairs
from opentau_train.data.lerobot.info import RESTORE, Info
from opentau_train.data.lerobot.spans import Span
from opentau_train.data.lerobot.tables import parquet_files, read_jsonl, read_parquet, text_columns
from opentau_train.data.remote.mirror import mirror_at
from opentau_train.errors import UserError
from opentau_train.types import EpisodeTable

log = logging.getLogger(__name__)

NO_EPISODES = "record some, or remove the source"
MOST_ROWS = 2**31 - 1
"""Of an episode: lengths are 32-bit numbers."""
_TASK_COLUMNS = {"task": 0, "__index_level_0__": 1}
"""Names of the column of texts in tasks.parquet, the likelier one first."""
_VIDEO_FIELDS = {"chunk_index": int, "file_index": int, "from_timestamp": float}
"""What meta/episodes says of an episode's video: {field: type}."""


@dataclass(frozen=True)
class VideoPlaces:
    """Where one camera's frames are, see `spans.Span`: `file` [E] i32 places in `files`; `start`, `first`, `end` [E]
    f64 seconds in that mp4; `claimed` [E, 2] f64; `rows`, `sharing` [E] i64."""

    files: FileTable
    file: NDArray[np.int32]
    start: NDArray[np.float64]
    first: NDArray[np.float64]
    end: NDArray[np.float64]
    claimed: NDArray[np.float64]
    rows: NDArray[np.int64]
    sharing: NDArray[np.int64]

    def select(self, keep: NDArray) -> VideoPlaces:
        """The episodes at the positions `keep`, in that order."""
        columns = (self.file, self.start, self.first, self.end, self.claimed, self.rows, self.sharing)
        return VideoPlaces(self.files, *(column[keep] for column in columns))

    def span(self, position: int) -> Span:
        """The frames of the episode at `position`."""
        path, (first, end) = self.files.path(int(self.file[position])), self.claimed[position].tolist()
        start, begin, stop = (float(column[position]) for column in (self.start, self.first, self.end))
        return Span(path, start, begin, stop, (first, end), int(self.rows[position]), int(self.sharing[position]))


@dataclass(frozen=True)
class StoredEpisodes:
    """The episodes in use and where they are stored: `data_file` [E] i32 places in `data`, `row_start` [E] i64 the
    episode's first row in its file, `videos` {camera stored as video: its places}.

    `rows_in_file` [F] i64: how many rows the metadata place in each file of rows; `shared_files`: files may hold
    several episodes; `order`: the column of rows that tells their order in the episode, None where there is none;
    `excluded`: the numbers of the episodes that the settings leave out already, which a remedy names too.
    """

    table: EpisodeTable
    data: FileTable
    data_file: NDArray[np.int32]
    row_start: NDArray[np.int64]
    videos: Mapping[str, VideoPlaces]
    rows_in_file: NDArray[np.int64]
    shared_files: bool
    order: str | None
    excluded: tuple[int, ...] = ()

    def paths(self, position: int) -> list[Path]:
        """The files of the episode at `position`, as the metadata have it: of its rows, then of each camera."""
        videos = [places.files.path(int(places.file[position])) for places in self.videos.values()]
        return [self.data.path(int(self.data_file[position])), *videos]

    def row_files(self) -> NDArray[np.int32] | None:
        """See `FiledSource.row_files`; one thread alone reads from a server, on which it fetches files ahead."""
        return self.data_file if mirror_at(self.data.root) is None else None

    def select(self, keep: NDArray) -> StoredEpisodes:
        """The episodes at the positions `keep`, in that order."""
        return replace(
            self,
            table=self.table.select(keep),
            data_file=self.data_file[keep],
            row_start=self.row_start[keep],
            videos={camera: places.select(keep) for camera, places in self.videos.items()},
        )


@dataclass(frozen=True)
class Episodes:
    """The episodes that the metadata list, as columns by rising `episode_index`.

    An episode is the `length` rows from `row_start` on of the file (`chunk`, `file`); `videos` {column: (chunk, file,
    seconds at which the episode starts)}; `extra` {column: values} and `told` {column: [E] f64, NaN where nothing is
    told} of the further columns that were asked for and are there; `names`: all columns of the per-episode metadata.
    """

    episode_index: NDArray[np.int64]
    length: NDArray[np.int64]
    chunk: NDArray[np.int64]
    file: NDArray[np.int64]
    row_start: NDArray[np.int64]
    videos: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]
    extra: Mapping[str, list[Any]]
    told: Mapping[str, NDArray[np.float64]]
    names: tuple[str, ...]

    def select(self, keep: NDArray) -> Episodes:
        """The episodes at the positions `keep`, in that order."""
        return replace(
            self,
            episode_index=self.episode_index[keep],
            length=self.length[keep],
            chunk=self.chunk[keep],
            file=self.file[keep],
            row_start=self.row_start[keep],
            videos={column: (c[keep], f[keep], start[keep]) for column, (c, f, start) in self.videos.items()},
            extra={name: [values[i] for i in keep] for name, values in self.extra.items()},
            told={name: values[keep] for name, values in self.told.items()},
        )


def read_episodes(info: Info, video_columns: Iterable[str], extra: Iterable[str], told: Iterable[str] = ()) -> Episodes:
    """Every episode of the dataset. `extra` and `told` name columns that may be there. Raises `UserError`."""
    where = str(info.root / "meta")
    listing = info.root / "meta" / ("episodes.jsonl" if info.file_an_episode else "episodes")
    if info.tree.get("total_episodes") == 0 and not listing.exists():
        raise UserError("the dataset has no episodes", where=where, remedy=NO_EPISODES)
    read = _episodes_v21 if info.file_an_episode else _episodes_v30
    episodes = read(info, tuple(video_columns), tuple(extra), tuple(told))
    if (np.diff(episodes.episode_index) <= 0).any():
        order = np.argsort(episodes.episode_index, kind="stable")
        index = episodes.episode_index[order]
        again = np.append(False, np.diff(index) == 0)
        if again.any():
            twice = np.unique(index[again])
            log.warning("%s: of episodes that are listed twice the first line counts: %s", where, twice)
        episodes = episodes.select(order[~again])
    index, length = episodes.episode_index, episodes.length
    if len(index) == 0:
        raise UserError("the dataset has no episodes", where=where, remedy=NO_EPISODES)
    if (abs(length) > MOST_ROWS).any():
        wrong = int(np.argmax(abs(length) > MOST_ROWS))
        raise UserError(f"episode {index[wrong]} has {length[wrong]} rows", where=where, remedy=RESTORE)
    return episodes


def read_tasks(info: Info, needed: bool) -> dict[int, str]:
    """{task_index: text}. Raises `UserError`, where they are `needed` also if there are none."""
    if info.file_an_episode:
        path, column = info.root / "meta" / "tasks.jsonl", "task"
        table = read_jsonl(path, {"task_index": int}, [column])
    else:
        path = info.root / "meta" / "tasks.parquet"
        # pandas wrote the texts as its index, whose column may have any name.
        columns = sorted(text_columns(path), key=lambda n: _TASK_COLUMNS.get(n, len(_TASK_COLUMNS)))
        column = next(iter(columns), "task")
        if len(columns) > 1 and column not in _TASK_COLUMNS:
            what = f"columns of texts {', '.join(columns)}, of which none is called 'task'"
            raise UserError(what, where=str(path), remedy=f"rename the one with the instructions, or {RESTORE}")
        table = read_parquet([path], {"task_index": int}, [column])
    texts = table.values.get(column, [])
    wrong = next((row for row, text in enumerate(texts) if not isinstance(text, str | None)), None)
    if wrong is not None or len(texts) != len(table.numbers["task_index"]):
        what = (
            "no column of texts" if wrong is None else f"column '{column}', entry {wrong}: {texts[wrong]!r} is no text"
        )
        raise UserError(what, where=str(path), remedy=RESTORE)
    if needed and not texts:
        raise UserError("it lists no task", where=str(path), remedy=RESTORE)
    return dict(zip(table.numbers["task_index"].tolist(), (text or "" for text in texts), strict=True))


def _episodes_v30(
    info: Info, video_columns: tuple[str, ...], extra: tuple[str, ...], told: tuple[str, ...]
) -> Episodes:
    paths = parquet_files(info.root / "meta" / "episodes")
    names = ["episode_index", "data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index"]
    table = read_parquet(paths, dict.fromkeys(names, int), extra, told)
    chunk, file, start = (table.numbers[n] for n in ("data/chunk_index", "data/file_index", "dataset_from_index"))
    *_, number = distinct_pairs(chunk, file)
    first_row = np.full(number.max() + 1 if len(number) else 0, np.iinfo(np.int64).max)
    np.minimum.at(first_row, number, start)
    videos = {}
    for key in video_columns:
        fields = {f"videos/{key}/{f}": kind for f, kind in _VIDEO_FIELDS.items()}
        if fields.keys() & set(table.names):  # else the camera has no video at all
            places = read_parquet(paths, fields, remedy=_without_camera(info, key))
            chunks, files, begins = places.numbers.values()
            if f"videos/{key}/from_timestamp" in places.integers:
                _check_whole_seconds(info, paths, key, begins)
            videos[key] = chunks, files, begins
    return Episodes(
        episode_index=table.numbers["episode_index"],
        length=table.numbers["dataset_to_index"] - start,
        chunk=chunk,
        file=file,
        row_start=start - first_row[number] if len(number) else start,
        videos=videos,
        extra=table.values,
        told=table.told,
        names=table.names,
    )


def _without_camera(info: Info, column: str) -> str:
    """The remedy where the metadata of a camera's videos can't be used."""
    others = [name for name, feature in info.features.items() if feature.get("dtype") in CAMERA and name != column]
    return f"{RESTORE}, or leave the camera out: {info.where}.cameras=[{','.join(others)}]"


def _check_whole_seconds(info: Info, paths: list[Path], key: str, begins: NDArray[np.float64]) -> None:
    """LeRobot writes seconds as floats. Where a file has integers, raise `UserError` naming an episode whose
    `to_timestamp` contradicts them: a fraction was cut off, and frames of another episode would be shown."""
    column, to = f"videos/{key}/from_timestamp", f"videos/{key}/to_timestamp"
    rows = {"episode_index": int, "dataset_from_index": int, "dataset_to_index": int}
    if to not in read_parquet(paths, rows).names:
        return
    index, start, stop, ends = read_parquet(paths, {**rows, to: float}).numbers.values()
    fps = float(info.get("fps"))
    wrong = np.flatnonzero(np.abs(ends - begins - (stop - start) / fps) > 0.5 / fps)
    if len(wrong):
        row = wrong[0]
        raise UserError(
            f"column '{column}' has whole seconds, whose fraction was cut off: episode {index[row]} is "
            f"{stop[row] - start[row]} rows, {begins[row]:g} to {ends[row]:g} s",
            where=str(info.root / "meta" / "episodes"),
            remedy=_without_camera(info, key),
        )


def _episodes_v21(
    info: Info, video_columns: tuple[str, ...], extra: tuple[str, ...], told: tuple[str, ...]
) -> Episodes:
    table = read_jsonl(info.root / "meta" / "episodes.jsonl", {"episode_index": int, "length": int}, extra, told)
    index = table.numbers["episode_index"]
    chunk = index // int(info.tree.get("chunks_size") or 1000)
    zero = np.zeros(len(index))
    return Episodes(
        episode_index=index,
        length=table.numbers["length"],
        chunk=chunk,
        file=index,
        row_start=zero.astype(np.int64),
        videos={key: (chunk, index, zero) for key in video_columns},
        extra=table.values,
        told=table.told,
        names=table.names,
    )
