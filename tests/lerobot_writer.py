"""Writes small LeRobot datasets (v3.0 and v2.1) with every frame, row and task different from the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa

from opentau_train.data.builtin import video, writer
from opentau_train.data.builtin.video import png as png

TICKS = 90_000
"""Ticks a second of the videos: fine enough for any frame time."""

H264_B = {"preset": "veryfast", "bf": "3", "crf": "30"}
HEVC_B = {"preset": "ultrafast", "x265-params": "bframes=3:b-adapt=0:open-gop=1:log-level=none", "crf": "30"}
AV1 = {"preset": "12", "crf": "40"}


@dataclass(frozen=True)
class Camera(video.Camera):
    codec: str | None = "libx264"
    size: tuple[int, int] = (64, 96)
    gop: int = 2
    episodes_per_file: int = 3
    ticks: int = TICKS


@dataclass(frozen=True)
class Dataset:
    """What to write. `seconds[e]` gives the row times of episode e; None = `i / fps`. `columns` {name: (feature,
    values(episode, frame))} are added to the rows."""

    lengths: Sequence[int] = (11, 7, 13, 9, 5)
    fps: int = 30
    version: str = "v3.0"
    cameras: Mapping[str, Camera] = field(default_factory=lambda: {"observation.images.front": Camera()})
    episodes_per_data_file: int = 2
    row_group_rows: int = 1000
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


def task_text(index: int) -> str:
    return f"task {index} | alternatively task {index}"


def write(root: Path, dataset: Dataset) -> Path:
    """Write the dataset to `root` and return it."""
    columns = dict(dataset.columns) if "action" in dataset.columns else {**DEFAULT_COLUMNS, **dataset.columns}
    num = len(dataset.lengths)
    layout = writer.Layout(
        {name: writer.Feature(**feature) for name, (feature, _) in columns.items()},
        dataset.cameras,
        dataset.fps,
        robot_type="arm",
        episodes_per_data_file=dataset.episodes_per_data_file,
        extra_info={"a_key_of_the_future": {"x": 1}, **dataset.info},
        version=dataset.version,
        row_group_rows=dataset.row_group_rows,
        episodes_per_meta_file=(num + 1) // 2,
        task_column=dataset.task_column,
        statistics=False,
    )
    episodes = [_episode(dataset, columns, e) for e in range(num)]
    for key, camera in layout.videos.items():
        files: dict[int, list[tuple[float, np.ndarray]]] = {}
        for e, (number, start) in enumerate(layout.places(camera, episodes)):
            timed = enumerate(float(start) + row_seconds(dataset, e))
            files.setdefault(number, []).extend((s, picture(e, f, key, camera.size)) for f, s in timed)
        for number, frames in files.items():
            write_video(root / layout.path(number, key), camera, frames)
    writer.write_tables(root, layout, episodes)
    return root


def _episode(dataset: Dataset, columns: Mapping[str, Any], e: int) -> writer.Episode:
    frames = range(dataset.lengths[e])
    rows: dict[str, Any] = {name: pa.array([values(e, f) for f in frames]) for name, (_, values) in columns.items()}
    for key, camera in dataset.cameras.items():
        if camera.codec is None:
            rows[key] = [picture(e, f, key, camera.size) for f in frames]
    meta = {"stats/action/mean": [0.0]} if dataset.version == "v3.0" else {}
    meta |= {name: values[e] for name, values in dataset.episode_columns.items()}
    return writer.Episode(task_text(e % 2), len(frames), rows, row_seconds(dataset, e), meta)


def write_video(path: Path, camera: Camera, frames: Sequence[tuple[float, np.ndarray]]) -> None:
    """Encode (seconds, picture) pairs."""
    video.write_video(path, camera, 30, ((round(seconds * camera.ticks), image) for seconds, image in frames))


def decode_all(path: Path) -> tuple[np.ndarray, list[av.VideoFrame]]:
    """The reference that readers are compared to: (seconds [N], frames) of the whole file, decoded in order by
    PyAV's own container."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.array([float(f.pts * f.time_base) for f in frames]), frames
