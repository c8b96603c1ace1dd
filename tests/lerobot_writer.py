"""Writes small LeRobot datasets (v3.0 and v2.1) with every frame, row and task different from the next."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TICKS = 90_000
"""Ticks a second of the videos: fine enough for any frame time."""

H264_B = {"preset": "veryfast", "bf": "3", "crf": "30"}
HEVC_B = {"preset": "ultrafast", "x265-params": "bframes=3:b-adapt=0:open-gop=1:log-level=none", "crf": "30"}
AV1 = {"preset": "12", "crf": "40"}


@dataclass(frozen=True)
class Camera:
    """`codec` None stores images in parquet. `shift_s`: the time of each file's first frame. `ticks` a second.
    `colour`: (range, space) as FFmpeg numbers them; where the codec can't say it, only the container does."""

    codec: str | None = "libx264"
    size: tuple[int, int] = (64, 96)
    gop: int = 2
    options: Mapping[str, str] = field(default_factory=dict)
    episodes_per_file: int = 3
    shift_s: float = 0.0
    pix_fmt: str = "yuv420p"
    ticks: int = TICKS
    colour: tuple[int, int] | None = None


@dataclass(frozen=True)
class Dataset:
    """What to write. `seconds[e]` gives the row times of episode e; None = `i / fps`. `columns` {name: (feature,
    values(episode, frame))} are added to the rows; `features_only` to info.json alone."""

    lengths: Sequence[int] = (11, 7, 13, 9, 5)
    fps: int = 30
    version: str = "v3.0"
    cameras: Mapping[str, Camera] = field(default_factory=lambda: {"observation.images.front": Camera()})
    episodes_per_data_file: int = 2
    row_group_rows: int | None = None
    seconds: Sequence[Sequence[float]] | None = None
    columns: Mapping[str, tuple[dict[str, Any], Any]] = field(default_factory=dict)
    task_column: str = "task"
    info: Mapping[str, Any] = field(default_factory=dict)
    episode_columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def vector(width: int, salt: float = 0.0, dtype: str = "float32", names: Any = None) -> tuple[dict[str, Any], Any]:
    """A feature of `width` numbers and its values, which differ in every row."""
    feature = {"dtype": dtype, "shape": [width], "names": names}
    return feature, lambda e, f: (salt + 100 * e + f + np.arange(width) / 16).tolist()


DEFAULT_COLUMNS = {"observation.state": vector(4), "action": vector(3, 0.5)}


def picture(episode: int, frame: int, camera: str, size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] uint8: coarse coloured squares of a colour that no other frame has."""
    rng = np.random.default_rng([episode, frame, len(camera), *camera.encode()])
    cells = rng.integers(0, 256, (size[0] // 16, size[1] // 16, 3), np.uint8)
    return np.kron(cells, np.ones((16, 16, 1), np.uint8))


def row_seconds(dataset: Dataset, episode: int) -> np.ndarray:
    """[L] f64: the times of an episode's rows since its start."""
    if dataset.seconds is not None:
        return np.asarray(dataset.seconds[episode], np.float64)
    return np.arange(dataset.lengths[episode]) / dataset.fps


def write(root: Path, dataset: Dataset) -> Path:
    """Write the dataset to `root` and return it."""
    (root / "meta").mkdir(parents=True)
    starts = {key: _write_videos(root, dataset, key, c) for key, c in dataset.cameras.items() if c.codec}
    _write_rows(root, dataset)
    _write_info(root, dataset)
    (_write_meta_v30 if dataset.version == "v3.0" else _write_meta_v21)(root, dataset, starts)
    return root


@contextmanager
def ordinary_priority() -> Iterator[None]:
    """Around an encoder: SVT-AV1, run by root, gives the thread that opens it real-time priority (SCHED_FIFO 99) for
    good, and every process started afterwards inherits it: two that are busy leave the machine's other ones nothing."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def write_video(path: Path, camera: Camera, frames: Sequence[tuple[float, np.ndarray]]) -> None:
    """Encode (seconds, picture) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ordinary_priority(), av.open(str(path), "w") as out:
        stream = out.add_stream(camera.codec, rate=30, options={"g": str(camera.gop), **camera.options})
        stream.height, stream.width = camera.size
        stream.pix_fmt = camera.pix_fmt
        stream.codec_context.gop_size = camera.gop
        stream.codec_context.time_base = stream.time_base = Fraction(1, camera.ticks)
        if camera.colour:
            stream.codec_context.color_range, stream.codec_context.colorspace = camera.colour
            stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
        for seconds, image in frames:
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = round(seconds * camera.ticks), Fraction(1, camera.ticks)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def decode_all(path: Path) -> tuple[np.ndarray, list[av.VideoFrame]]:
    """The reference that readers are compared to: (seconds [N], frames) of the whole file, decoded in order by
    PyAV's own container."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.array([float(f.pts * f.time_base) for f in frames]), frames


def _groups(dataset: Dataset, per_file: int) -> list[list[int]]:
    per_file = 1 if dataset.version == "v2.1" else per_file
    episodes = list(range(len(dataset.lengths)))
    return [episodes[i : i + per_file] for i in range(0, len(episodes), per_file)]


def _video_path(dataset: Dataset, key: str, number: int) -> str:
    if dataset.version == "v2.1":
        return f"videos/chunk-000/{key}/episode_{number:06d}.mp4"
    return f"videos/{key}/chunk-000/file-{number:03d}.mp4"


def _data_path(dataset: Dataset, number: int) -> str:
    if dataset.version == "v2.1":
        return f"data/chunk-000/episode_{number:06d}.parquet"
    return f"data/chunk-000/file-{number:03d}.parquet"


def _write_videos(root: Path, dataset: Dataset, key: str, camera: Camera) -> list[tuple[int, float]]:
    """(file number, start in seconds) of every episode."""
    starts = []
    for number, episodes in enumerate(_groups(dataset, camera.episodes_per_file)):
        now, frames = camera.shift_s, []
        for e in episodes:
            starts.append((number, now))
            seconds = row_seconds(dataset, e)
            frames += [(now + s, picture(e, f, key, camera.size)) for f, s in enumerate(seconds)]
            now += seconds[-1] + 1 / dataset.fps
        write_video(root / _video_path(dataset, key, number), camera, frames)
    return starts


def _write_rows(root: Path, dataset: Dataset) -> None:
    first = np.cumsum([0, *dataset.lengths])
    for number, episodes in enumerate(_groups(dataset, dataset.episodes_per_data_file)):
        rows = [(e, f) for e in episodes for f in range(dataset.lengths[e])]
        data: dict[str, Any] = {
            name: [values(e, f) for e, f in rows] for name, (_, values) in _columns(dataset).items()
        }
        for key, camera in dataset.cameras.items():
            if camera.codec is None:
                data[key] = [{"bytes": png(picture(e, f, key, camera.size)), "path": None} for e, f in rows]
        data["timestamp"] = pa.array([row_seconds(dataset, e)[f] for e, f in rows], pa.float32())
        data["frame_index"] = [f for _, f in rows]
        data["episode_index"] = [e for e, _ in rows]
        data["index"] = [int(first[e]) + f for e, f in rows]
        data["task_index"] = [e % 2 for e, _ in rows]
        path = root / _data_path(dataset, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(data), path, row_group_size=dataset.row_group_rows)


def png(pixels: np.ndarray) -> bytes:
    """The pixels ([H, W], or [H, W, 3]) as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _columns(dataset: Dataset) -> dict[str, tuple[dict[str, Any], Any]]:
    return dict(dataset.columns) if "action" in dataset.columns else {**DEFAULT_COLUMNS, **dataset.columns}


def _write_info(root: Path, dataset: Dataset) -> None:
    features: dict[str, Any] = {name: feature for name, (feature, _) in _columns(dataset).items()}
    for key, camera in dataset.cameras.items():
        features[key] = {"dtype": "video" if camera.codec else "image", "shape": [*camera.size, 3], "names": None}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for key in ("frame_index", "episode_index", "index", "task_index"):
        features[key] = {"dtype": "int64", "shape": [1], "names": None}
    if dataset.version == "v2.1":
        data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        video = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    else:
        data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    info = {
        "codebase_version": dataset.version,
        "robot_type": "arm",
        "fps": dataset.fps,
        "chunks_size": 1000,
        "data_path": data,
        "video_path": video,
        "features": features,
        "a_key_of_the_future": {"x": 1},
        **dataset.info,
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))


def task_text(index: int) -> str:
    return f"task {index} | alternatively task {index}"


def _write_meta_v30(root: Path, dataset: Dataset, starts: Mapping[str, list[tuple[int, float]]]) -> None:
    data_file = [n for n, group in enumerate(_groups(dataset, dataset.episodes_per_data_file)) for _ in group]
    first = np.cumsum([0, *dataset.lengths])
    rows: dict[str, Any] = {
        "episode_index": list(range(len(dataset.lengths))),
        "data/chunk_index": [0] * len(data_file),
        "data/file_index": data_file,
        "dataset_from_index": first[:-1],
        "dataset_to_index": first[1:],
        "length": list(dataset.lengths),
        "stats/action/mean": [[0.0]] * len(data_file),
        **dataset.episode_columns,
    }
    for key, places in starts.items():
        rows[f"videos/{key}/chunk_index"] = [0] * len(places)
        rows[f"videos/{key}/file_index"] = [n for n, _ in places]
        rows[f"videos/{key}/from_timestamp"] = [s for _, s in places]
    table = pa.table(rows)
    half = (len(data_file) + 1) // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        path = root / f"meta/episodes/chunk-000/file-{number:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(part, path)
    tasks = pa.table({"task_index": [0, 1], dataset.task_column: [task_text(0), task_text(1)]})
    pq.write_table(tasks, root / "meta" / "tasks.parquet")


def _write_meta_v21(root: Path, dataset: Dataset, starts: Mapping[str, list[tuple[int, float]]]) -> None:
    episodes = [
        {
            "episode_index": e,
            "tasks": [task_text(e % 2)],
            "length": n,
            **{k: v[e] for k, v in dataset.episode_columns.items()},
        }
        for e, n in enumerate(dataset.lengths)
    ]
    tasks = [{"task_index": i, "task": task_text(i)} for i in range(2)]
    for name, rows in (("episodes", episodes), ("tasks", tasks)):
        (root / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
