"""Writes datasets in LeRobot's v3.0 layout: the files, columns and metadata that its own recorder leaves.

Several episodes share a parquet file (one row group each) and an mp4 (their frames one after another; each mp4's
clock starts at 0). Nothing here depends on the clock or the machine: the same episodes give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
GOP = 10
"""Frames from one key frame to the next."""
_CODEC = {"crf": "26", "preset": "ultrafast"}
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


@dataclass(frozen=True)
class Feature:
    """One entry of info.json's `features`: `dtype` float32, int64, string or video; `shape` without the time axis
    ((1,) is stored as a scalar column); `names` as LeRobot has them, or None."""

    dtype: str
    shape: tuple[int, ...]
    names: Any = None

    def describe(self, fps: int) -> dict[str, Any]:
        """The JSON of this feature."""
        entry = {"dtype": self.dtype, "shape": list(self.shape), "names": self.names}
        if self.dtype == "video":
            height, width, channels = self.shape
            entry["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.fps": fps,
                "video.channels": channels,
                "has_audio": False,
                "is_depth_map": False,
            }
        return entry

    @property
    def arrow(self) -> pa.DataType:
        if self.dtype == "string":
            return pa.string()
        value = {"float32": pa.float32(), "int64": pa.int64()}[self.dtype]
        return value if self.shape == (1,) else pa.list_(value, self.shape[0])

    @property
    def hub(self) -> dict[str, Any]:
        """The type as the `datasets` library notes it in the parquet's metadata."""
        value = {"dtype": self.dtype, "_type": "Value"}
        if self.shape == (1,):
            return value
        return {"feature": value, "length": self.shape[0], "_type": "List"}


INDEX_FEATURES = {
    "timestamp": Feature("float32", (1,)),
    "frame_index": Feature("int64", (1,)),
    "episode_index": Feature("int64", (1,)),
    "index": Feature("int64", (1,)),
    "task_index": Feature("int64", (1,)),
}


@dataclass(frozen=True)
class Episode:
    """`columns` {feature: [L] or [L, D] array, or one string for all rows}; `task`, its text."""

    task: str
    length: int
    columns: Mapping[str, NDArray | str]


@dataclass(frozen=True)
class Layout:
    """A dataset's schema and how its episodes are dealt to files; everything lies in chunk 000."""

    features: Mapping[str, Feature]
    fps: int
    robot_type: str
    episodes_per_data_file: int
    episodes_per_video_file: int
    extra_info: Mapping[str, Any]

    @property
    def videos(self) -> list[str]:
        return [name for name, feature in self.features.items() if feature.dtype == "video"]

    @property
    def columns(self) -> dict[str, Feature]:
        """The features that are parquet columns, the index columns last."""
        own = {name: feature for name, feature in self.features.items() if feature.dtype != "video"}
        return own | INDEX_FEATURES


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], fps: int) -> None:
    """An h264 mp4 of `[H, W, 3]` uint8 RGB frames, at i / fps seconds exactly, without reordered frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = None
        for i, pixels in enumerate(frames):
            if stream is None:
                # One thread: x264's result depends on the number of threads.
                options = _CODEC | {"threads": "1", "g": str(GOP), "keyint_min": str(GOP), "bf": "0"}
                stream = container.add_stream("libx264", rate=fps, options=options | {"sc_threshold": "0"})
                stream.height, stream.width, stream.pix_fmt = pixels.shape[0], pixels.shape[1], "yuv420p"
                stream.codec_context.time_base = Fraction(1, fps)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode(None))


def write_tables(root: Path, layout: Layout, episodes: Sequence[Episode]) -> None:
    """All of the dataset but the videos: `data/`, `meta/info.json`, `meta/stats.json`, `meta/tasks.parquet`,
    `meta/episodes/`."""
    tasks = list(dict.fromkeys(episode.task for episode in episodes))
    tables = _tables(layout, episodes, tasks)
    for start in range(0, len(tables), layout.episodes_per_data_file):
        part = tables[start : start + layout.episodes_per_data_file]
        path = root / DATA_PATH.format(chunk_index=0, file_index=start // layout.episodes_per_data_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, part[0].schema) as writer:
            for table in part:
                writer.write_table(table, row_group_size=len(table))
    _write_episodes(root, layout, episodes, tables)
    _write_tasks(root / "meta" / "tasks.parquet", tasks)
    _write_json(root / "meta" / "stats.json", _statistics(layout, pa.concat_tables(tables)))
    num_frames = sum(episode.length for episode in episodes)
    described = {name: f.describe(layout.fps) for name, f in (dict(layout.features) | INDEX_FEATURES).items()}
    info = {
        "codebase_version": "v3.0",
        "fps": layout.fps,
        "features": described,
        "total_episodes": len(episodes),
        "total_frames": num_frames,
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "robot_type": layout.robot_type,
        "splits": {"train": f"0:{len(episodes)}"},
    }
    _write_json(root / "meta" / "info.json", info | dict(layout.extra_info))


def _tables(layout: Layout, episodes: Sequence[Episode], tasks: list[str]) -> list[pa.Table]:
    """One arrow table an episode, with the index columns."""
    features = {name: feature.hub for name, feature in layout.columns.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([(n, f.arrow) for n, f in layout.columns.items()], metadata=metadata)
    tables, first = [], 0
    for number, episode in enumerate(episodes):
        frame = np.arange(episode.length)
        columns = dict(episode.columns) | {
            "timestamp": frame / layout.fps,
            "frame_index": frame,
            "episode_index": np.full(episode.length, number),
            "index": first + frame,
            "task_index": np.full(episode.length, tasks.index(episode.task)),
        }
        arrays = [_column(columns[name], feature, episode.length) for name, feature in layout.columns.items()]
        tables.append(pa.Table.from_arrays(arrays, schema=schema))
        first += episode.length
    return tables


def _column(values: NDArray | str, feature: Feature, length: int) -> pa.Array:
    if isinstance(values, str):
        return pa.array([values] * length, pa.string())
    flat = np.ascontiguousarray(values, np.dtype(feature.dtype)).reshape(-1)
    if feature.shape == (1,):
        return pa.array(flat)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=feature.arrow)


def _write_episodes(root: Path, layout: Layout, episodes: Sequence[Episode], tables: list[pa.Table]) -> None:
    rows, first, clock = [], 0, 0
    for number, (episode, table) in enumerate(zip(episodes, tables)):
        video_file, place = divmod(number, layout.episodes_per_video_file)
        clock = 0 if place == 0 else clock
        row = {
            "episode_index": number,
            "tasks": [episode.task],
            "length": episode.length,
            "data/chunk_index": 0,
            "data/file_index": number // layout.episodes_per_data_file,
            "dataset_from_index": first,
            "dataset_to_index": first + episode.length,
        }
        for video in layout.videos:
            row[f"videos/{video}/chunk_index"] = 0
            row[f"videos/{video}/file_index"] = video_file
            row[f"videos/{video}/from_timestamp"] = clock / layout.fps
            row[f"videos/{video}/to_timestamp"] = (clock + episode.length) / layout.fps
        for name, numbers in _statistics(layout, table).items():
            row |= {f"stats/{name}/{kind}": value for kind, value in numbers.items()}
        rows.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        first += episode.length
        clock += episode.length
    path = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def _write_tasks(path: Path, tasks: list[str]) -> None:
    """The task texts are the pandas index of the table: the key `pandas` says so to those who read it that way."""
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_kind, "metadata": None}
        for name, (kind, numpy_kind) in kinds.items()
    ]
    header = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [header | {"metadata": {"encoding": "UTF-8"}}],
        "columns": columns,
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.3.3",
    }
    schema = pa.schema([("task_index", pa.int64()), ("task", pa.string())], metadata={"pandas": json.dumps(pandas)})
    pq.write_table(pa.table([pa.array(range(len(tasks)), pa.int64()), pa.array(tasks)], schema=schema), path)


def _statistics(layout: Layout, table: pa.Table) -> dict[str, dict[str, list]]:
    """{numeric column: {min, max, mean, std, count, q01, ...: a list, one number a dimension}} over the rows."""
    found = {}
    for name, feature in layout.columns.items():
        if feature.dtype == "string":
            continue
        chunks = table.column(name).combine_chunks()
        flat = chunks.flatten() if feature.shape != (1,) else chunks
        values = flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(table), -1)
        numbers = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
        numbers |= dict(zip(_QUANTILES, np.quantile(values, list(_QUANTILES.values()), axis=0)))
        found[name] = {kind: value.tolist() for kind, value in numbers.items()} | {"count": [len(table)]}
    return found


def _write_json(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=4))
