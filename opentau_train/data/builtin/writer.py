"""Writes datasets in LeRobot's layouts v3.0 and v2.1: the files, columns and metadata that its own recorder leaves.

In v3.0 several episodes share a parquet file and an mp4 (their frames one after another, each mp4 with its own clock);
in v2.1 each has its own. Nothing here depends on the clock or the machine: the same episodes give the same bytes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opentau_train.data.builtin.colours import QUANTILES, Colours
from opentau_train.data.builtin.video import Camera, png

_PATHS = {
    "v3.0": (
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    ),
    "v2.1": (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    ),
}


@dataclass(frozen=True)
class Feature:
    """One entry of info.json's `features`: `dtype` a number's, bool, string or image; `shape` without the time
    axis ((1,) is stored as a scalar column); `names` as LeRobot has them, or None."""

    dtype: str
    shape: Sequence[int]
    names: Any = None

    def describe(self) -> dict[str, Any]:
        """The JSON of this feature."""
        return {"dtype": self.dtype, "shape": list(self.shape), "names": self.names}

    @property
    def hub(self) -> dict[str, Any]:
        """The type as the `datasets` library notes it in the parquet's metadata."""
        if self.dtype == "image":
            return {"_type": "Image"}
        value = {"dtype": self.dtype, "_type": "Value"}
        if tuple(self.shape) == (1,):
            return value
        return {"feature": value, "length": self.shape[0], "_type": "List"}


INDEX_FEATURES = {"timestamp": Feature("float32", (1,))} | {
    name: Feature("int64", (1,)) for name in ("frame_index", "episode_index", "index", "task_index")
}


@dataclass(frozen=True)
class Episode:
    """`columns` {feature: [L] or [L, D] array; [L, H, W, 3] uint8 pictures; an arrow array, stored as it is; or one
    string for all rows}; `task`, its text; `seconds` [L] of its rows since its start, None = i / fps; `meta`, more
    columns of the episodes' metadata, also in place of the writer's; `colours` {camera: of its pictures}, where the
    metadata are to hold their statistics."""

    task: str
    length: int
    columns: Mapping[str, NDArray | pa.Array | str]
    seconds: NDArray[np.float64] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    colours: Mapping[str, Colours] = field(default_factory=dict)

    def duration(self, fps: int) -> Fraction:
        last = Fraction(self.length - 1, fps) if self.seconds is None else Fraction(float(self.seconds[-1]))
        return last + Fraction(1, fps)


@dataclass(frozen=True)
class Layout:
    """A dataset's schema and how its episodes are dealt to files (v2.1: one each); everything lies in chunk 000.
    `row_group_rows`: None = a row group an episode. `task_column` of tasks.parquet, which pandas calls
    `__index_level_0__` where its index has no name. `statistics`: whether the metadata hold those of the rows."""

    features: Mapping[str, Feature]
    cameras: Mapping[str, Camera]
    fps: int
    robot_type: str
    episodes_per_data_file: int = 1
    extra_info: Mapping[str, Any] = field(default_factory=dict)
    version: str = "v3.0"
    row_group_rows: int | None = None
    episodes_per_meta_file: int = 1000
    task_column: str = "task"
    statistics: bool = True

    @property
    def columns(self) -> dict[str, Feature]:
        """The features that are parquet columns, the index columns last."""
        images = {key: Feature("image", camera.size) for key, camera in self.cameras.items() if camera.codec is None}
        return dict(self.features) | images | INDEX_FEATURES

    @property
    def videos(self) -> dict[str, Camera]:
        return {key: camera for key, camera in self.cameras.items() if camera.codec is not None}

    def data_file(self, episode: int) -> int:
        return episode if self.version == "v2.1" else episode // self.episodes_per_data_file

    def path(self, number: int, video_key: str | None = None) -> str:
        """Of the parquet file of that number, or of the camera's mp4."""
        place = {"chunk_index": 0, "file_index": number, "episode_chunk": 0, "episode_index": number}
        return _PATHS[self.version][video_key is not None].format(video_key=video_key, **place)

    def places(self, camera: Camera, episodes: Sequence[Episode]) -> list[tuple[int, Fraction]]:
        """(number of the mp4, seconds in it) of each episode's start."""
        per_file = 1 if self.version == "v2.1" else camera.episodes_per_file
        places, now = [], Fraction(0)
        for number, episode in enumerate(episodes):
            now = Fraction(camera.shift_s) if number % per_file == 0 else now
            places.append((number // per_file, now))
            now += episode.duration(self.fps)
        return places


def write_tables(root: Path, layout: Layout, episodes: Sequence[Episode]) -> None:
    """All of the dataset but the videos: `data/` and `meta/`."""
    tasks = list(dict.fromkeys(episode.task for episode in episodes))
    tables = _tables(layout, episodes, tasks)
    for number, group in itertools.groupby(range(len(tables)), layout.data_file):
        _write_rows(root / layout.path(number), [tables[e] for e in group], layout.row_group_rows)
    rows = _episode_rows(layout, episodes, tables)
    (root / "meta").mkdir(exist_ok=True)
    if layout.version == "v2.1":
        texts = [{"task_index": i, "task": text} for i, text in enumerate(tasks)]
        for name, lines in (("episodes", rows), ("tasks", texts)):
            (root / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        _write_episodes(root, layout, rows)
        _write_tasks(root / "meta" / "tasks.parquet", tasks, layout.task_column)
    if layout.statistics:
        statistics = _statistics(layout, pa.concat_tables(tables), episodes)
        (root / "meta" / "stats.json").write_text(json.dumps(statistics, indent=4))
    data_path, video_path = _PATHS[layout.version]
    features = {name: feature.describe() for name, feature in layout.features.items()}
    features |= {key: camera.describe(layout.fps) for key, camera in layout.cameras.items()}
    features |= {name: feature.describe() for name, feature in INDEX_FEATURES.items()}
    info = {
        "codebase_version": layout.version,
        "fps": layout.fps,
        "features": features,
        "total_episodes": len(episodes),
        "total_frames": sum(episode.length for episode in episodes),
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": data_path,
        "video_path": video_path,
        "robot_type": layout.robot_type,
        "splits": {"train": f"0:{len(episodes)}"},
    }
    (root / "meta" / "info.json").write_text(json.dumps(info | dict(layout.extra_info), indent=4))


def _tables(layout: Layout, episodes: Sequence[Episode], tasks: list[str]) -> list[pa.Table]:
    """One arrow table an episode, with the index columns."""
    features = layout.columns
    metadata = {"huggingface": json.dumps({"info": {"features": {n: f.hub for n, f in features.items()}}})}
    tables, first = [], 0
    for number, episode in enumerate(episodes):
        frame = np.arange(episode.length)
        columns = dict(episode.columns) | {
            "timestamp": frame / layout.fps if episode.seconds is None else episode.seconds,
            "frame_index": frame,
            "episode_index": np.full(episode.length, number),
            "index": first + frame,
            "task_index": np.full(episode.length, tasks.index(episode.task)),
        }
        arrays = [_column(columns[name], feature, episode.length) for name, feature in features.items()]
        tables.append(pa.table(arrays, names=list(features), metadata=metadata))
        first += episode.length
    return tables


def _column(values: NDArray | pa.Array | str, feature: Feature, length: int) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    if isinstance(values, str):
        return pa.array([values] * length, pa.string())
    if feature.dtype == "image":
        return pa.array([{"bytes": png(pixels), "path": None} for pixels in values])
    flat = pa.array(np.ascontiguousarray(values, np.dtype(feature.dtype)).reshape(-1))
    return flat if feature.shape == (1,) else pa.FixedSizeListArray.from_arrays(flat, feature.shape[0])


def _write_rows(path: Path, tables: list[pa.Table], row_group_rows: int | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = pa.concat_tables(tables)
    if row_group_rows is not None:
        tables = [whole.slice(start, row_group_rows) for start in range(0, len(whole), row_group_rows)]
    with pq.ParquetWriter(path, whole.schema) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=len(table))


def _episode_rows(layout: Layout, episodes: Sequence[Episode], tables: list[pa.Table]) -> list[dict[str, Any]]:
    """The rows of the episodes' metadata; v2.1 holds the first three columns alone."""
    rows, first = [], 0
    places = {key: layout.places(camera, episodes) for key, camera in layout.videos.items()}
    for number, (episode, table) in enumerate(zip(episodes, tables)):
        row: dict[str, Any] = {"episode_index": number, "tasks": [episode.task], "length": episode.length}
        if layout.version != "v2.1":
            row["data/chunk_index"], row["data/file_index"] = 0, layout.data_file(number)
            row["dataset_from_index"], row["dataset_to_index"] = first, first + episode.length
            for key in places:
                file, start = places[key][number]
                row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"] = 0, file
                row[f"videos/{key}/from_timestamp"] = float(start)
                row[f"videos/{key}/to_timestamp"] = float(start + episode.duration(layout.fps))
            for name, numbers in _statistics(layout, table, [episode]).items() if layout.statistics else ():
                row |= {f"stats/{name}/{kind}": value for kind, value in numbers.items()}
            row["meta/episodes/chunk_index"] = 0
            row["meta/episodes/file_index"] = number // layout.episodes_per_meta_file
        rows.append(row | dict(episode.meta))
        first += episode.length
    return rows


def _write_episodes(root: Path, layout: Layout, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    for number, start in enumerate(range(0, len(table), layout.episodes_per_meta_file)):
        path = root / f"meta/episodes/chunk-000/file-{number:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(start, layout.episodes_per_meta_file), path)


def _write_tasks(path: Path, tasks: list[str], text_column: str) -> None:
    """The task texts are the pandas index of the table: the key `pandas` says so to those who read it that way."""
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_kind, "metadata": None}
        for name, kind, numpy_kind in (("task_index", "int64", "int64"), (text_column, "unicode", "object"))
    ]
    header = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}
    pandas = {
        "index_columns": [text_column],
        "column_indexes": [header | {"metadata": {"encoding": "UTF-8"}}],
        "columns": columns,
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.3.3",
    }
    arrays = {"task_index": pa.array(range(len(tasks)), pa.int64()), text_column: pa.array(tasks, pa.string())}
    pq.write_table(pa.table(arrays, metadata={"pandas": json.dumps(pandas)}), path)


def _statistics(layout: Layout, table: pa.Table, episodes: Sequence[Episode]) -> dict[str, dict[str, list]]:
    """{numeric column: {min, max, mean, std, count, q01, ...: a list, one number a dimension}} over the rows, which are
    those of `episodes`; of cameras as `Colours` has them, where all episodes have."""
    statistics = {}
    for name, feature in layout.columns.items():
        if feature.dtype in ("string", "image"):
            continue
        chunks = table.column(name).combine_chunks()
        flat = chunks.flatten() if feature.shape != (1,) else chunks
        values = flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(table), -1)
        numbers = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
        numbers |= dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values()), axis=0)))
        statistics[name] = {kind: value.tolist() for kind, value in numbers.items()} | {"count": [len(table)]}
    for camera in layout.cameras:
        colours = [episode.colours[camera] for episode in episodes if camera in episode.colours]
        if len(colours) == len(episodes):
            statistics[camera] = Colours.total(colours).statistics()
    return statistics
