"""The metadata of a LeRobot dataset, v3.0 and v2.1: episodes, tasks, and where the files are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opentau_train.data.decode.parquet import UNREADABLE
from opentau_train.data.lerobot.info import RESTORE, Info
from opentau_train.errors import UserError
from opentau_train.machine import check_machine, check_machine_read
from opentau_train.types import EpisodeTable


@dataclass(frozen=True)
class FileTable:
    """Files of one kind, numbered: file i has the LeRobot numbers `chunk[i]` and `file[i]` in the path `template` below
    `root`. Paths are made when asked for: 100,000 files cost 16 bytes each."""

    root: Path
    template: str
    chunk: NDArray[np.int64]
    file: NDArray[np.int64]
    video_key: str = ""

    def __len__(self) -> int:
        return len(self.file)

    def relative(self, number: int) -> str:
        """The path of file `number` below `root`."""
        chunk, file = int(self.chunk[number]), int(self.file[number])
        return self.template.format(
            chunk_index=chunk, file_index=file, episode_chunk=chunk, episode_index=file, video_key=self.video_key
        )

    def path(self, number: int) -> Path:
        """The whole path of file `number`."""
        return self.root / self.relative(number)


@dataclass(frozen=True)
class VideoPlaces:
    """Where one camera's frames are: `file` [E] i32 places in `files`, `start` [E] f64 seconds at which the episode
    begins in its mp4."""

    files: FileTable
    file: NDArray[np.int32]
    start: NDArray[np.float64]


@dataclass(frozen=True)
class StoredEpisodes:
    """The episodes in use and where they are stored: `data_file` [E] i32 places in `data`, `row_start` [E] i64 the
    episode's first row in its file, `videos` {camera stored as video: its places}."""

    table: EpisodeTable
    data: FileTable
    data_file: NDArray[np.int32]
    row_start: NDArray[np.int64]
    videos: Mapping[str, VideoPlaces]

    def select(self, keep: NDArray) -> StoredEpisodes:
        """The episodes at the positions `keep`, in that order."""
        return StoredEpisodes(
            table=self.table.select(keep),
            data=self.data,
            data_file=self.data_file[keep],
            row_start=self.row_start[keep],
            videos={c: VideoPlaces(v.files, v.file[keep], v.start[keep]) for c, v in self.videos.items()},
        )


@dataclass(frozen=True)
class Episodes:
    """The episodes that the metadata list, as columns by rising `episode_index`.

    An episode is the `length` rows from `row_start` on of the file (`chunk`, `file`); `videos` {column: (chunk, file,
    seconds at which the episode starts)}; `extra` {column: values} of the further columns that were asked for and are
    there; `names`: all columns of the per-episode metadata.
    """

    episode_index: NDArray[np.int64]
    length: NDArray[np.int64]
    chunk: NDArray[np.int64]
    file: NDArray[np.int64]
    row_start: NDArray[np.int64]
    videos: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]
    extra: Mapping[str, list[Any]]
    names: tuple[str, ...]


def read_episodes(info: Info, video_columns: Iterable[str], extra: Iterable[str]) -> Episodes:
    """Every episode of the dataset. `extra` names columns that may be there. Raises `UserError`."""
    read = _episodes_v30 if info.get("codebase_version") == "v3.0" else _episodes_v21
    episodes = read(info, tuple(video_columns), tuple(extra))
    order = np.argsort(episodes.episode_index, kind="stable")
    index = episodes.episode_index[order]
    where = str(info.root / "meta")
    if len(index) == 0:
        raise UserError("the dataset has no episodes", where=where, remedy="record some, or remove the source")
    twice = index[1:][np.diff(index) == 0]
    if len(twice):
        raise UserError(f"episode {twice[0]} is listed twice", where=where, remedy=RESTORE)
    empty = index[episodes.length[order] <= 0]
    if len(empty):
        raise UserError(f"episode {empty[0]} has no rows", where=where, remedy="exclude or re-export it")
    return Episodes(
        episode_index=index,
        length=episodes.length[order],
        chunk=episodes.chunk[order],
        file=episodes.file[order],
        row_start=episodes.row_start[order],
        videos={c: (chunk[order], file[order], start[order]) for c, (chunk, file, start) in episodes.videos.items()},
        extra={name: [values[i] for i in order] for name, values in episodes.extra.items()},
        names=episodes.names,
    )


def read_tasks(info: Info) -> dict[int, str]:
    """{task_index: text}. Raises `UserError`."""
    if info.get("codebase_version") == "v2.1":
        path = info.root / "meta" / "tasks.jsonl"
        rows = _read_jsonl(path)
        return {_field(r, "task_index", int, path): _field(r, "task", str, path) for r in rows}
    path = info.root / "meta" / "tasks.parquet"
    table = _read_parquet(path, None)
    # pandas wrote the texts as its index, whose column may have any name.
    texts = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    texts.sort(key=lambda n: {"task": 0, "__index_level_0__": 1}.get(n, 2))
    if "task_index" not in table.column_names or not texts:
        raise UserError("no task_index column or no text column", where=str(path), remedy=RESTORE)
    return dict(zip(table.column("task_index").to_pylist(), table.column(texts[0]).to_pylist()))


def _episodes_v30(info: Info, video_columns: tuple[str, ...], extra: tuple[str, ...]) -> Episodes:
    folder = info.root / "meta" / "episodes"
    paths = sorted(folder.glob("**/*.parquet"))
    if not paths:
        raise UserError("no episode metadata: no parquet file", where=str(folder), remedy=RESTORE)
    names = ["episode_index", "data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index"]
    for key in video_columns:
        names += [f"videos/{key}/{field}" for field in ("chunk_index", "file_index", "from_timestamp")]
    table = pa.concat_tables([_read_parquet(p, names, extra) for p in paths], promote_options="default")
    column = {n: _metadata_numbers(table, n, folder) for n in names}
    chunk, file, start = (column[n] for n in ("data/chunk_index", "data/file_index", "dataset_from_index"))
    _, number = np.unique(np.stack([chunk, file]), axis=1, return_inverse=True)
    number = number.reshape(-1)
    first_row = np.full(number.max() + 1 if len(number) else 0, np.iinfo(np.int64).max)
    np.minimum.at(first_row, number, start)
    videos = {}
    for key in video_columns:
        parts = [column[f"videos/{key}/{f}"] for f in ("chunk_index", "file_index", "from_timestamp")]
        videos[key] = (parts[0], parts[1], parts[2].astype(np.float64))
    return Episodes(
        episode_index=column["episode_index"],
        length=column["dataset_to_index"] - start,
        chunk=chunk,
        file=file,
        row_start=start - first_row[number] if len(number) else start,
        videos=videos,
        extra={name: table.column(name).to_pylist() for name in extra if name in table.column_names},
        names=tuple(pq.read_schema(paths[0]).names),
    )


def _episodes_v21(info: Info, video_columns: tuple[str, ...], extra: tuple[str, ...]) -> Episodes:
    path = info.root / "meta" / "episodes.jsonl"
    rows = _read_jsonl(path)
    index = np.array([_field(r, "episode_index", int, path) for r in rows], np.int64)
    length = np.array([_field(r, "length", int, path) for r in rows], np.int64)
    chunk = index // int(info.tree.get("chunks_size") or 1000)
    zero = np.zeros(len(index))
    return Episodes(
        episode_index=index,
        length=length,
        chunk=chunk,
        file=index,
        row_start=zero.astype(np.int64),
        videos={key: (chunk, index, zero) for key in video_columns},
        extra={name: [r.get(name) for r in rows] for name in extra if any(name in r for r in rows)},
        names=tuple(dict.fromkeys(name for r in rows for name in r)),
    )


def _read_parquet(path: Path, names: list[str] | None, extra: tuple[str, ...] = ()) -> pa.Table:
    """The columns `names` (all for None) and, where the file has it, `extra`."""
    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            missing = [n for n in names or () if n not in there]
            if missing:
                raise UserError(f"no column '{missing[0]}'", where=str(path), remedy=RESTORE)
            wanted = None if names is None else [*dict.fromkeys([*names, *(n for n in extra if n in there)])]
            table = file.read(columns=wanted, use_threads=False)
            table.validate(full=True)
            return table
    except UNREADABLE as error:
        check_machine_read(error, path)
        raise UserError(f"the file can't be read: {error}", where=str(path), remedy=RESTORE) from error


def _metadata_numbers(table: pa.Table, name: str, folder: Path) -> NDArray[Any]:
    column = table.column(name)
    if column.null_count:
        raise UserError(f"column '{name}' has nulls", where=str(folder), remedy=RESTORE)
    return np.asarray(column)


def _read_jsonl(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        check_machine(error, path)
        raise UserError(f"the file can't be read: {error}", where=str(path), remedy=RESTORE) from error


def _field(row: Any, key: str, kind: type, path: Path) -> Any:
    if not isinstance(row, dict) or not isinstance(row.get(key), kind):
        raise UserError(
            f"an entry has no '{key}' ({kind.__name__}): {json.dumps(row)[:80]}", where=str(path), remedy=RESTORE
        )
    return row[key]
