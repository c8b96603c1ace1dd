"""Reading windows of a LeRobot dataset inside one worker process: rows from parquet, frames from mp4 or parquet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opentau_train.data.images import ImageError, Resizer, decode_image
from opentau_train.data.lerobot_columns import Column
from opentau_train.data.lerobot_meta import FileTable
from opentau_train.data.rows import RowError, RowReader, numbers, one_array, texts
from opentau_train.data.video import BURST, FrameCursor, VideoPool
from opentau_train.data.video_file import VideoError
from opentau_train.data.windows import chunk_places, history_rows, next_rows, row_step, rows_at
from opentau_train.errors import BadSample
from opentau_train.types import EpisodeTable, RawWindow, WindowSpec


@dataclass(frozen=True)
class Reading:
    """What a worker must know to read a dataset; picklable.

    `fps` is the rate of its rows; `timed` says that they have a timestamp column that is needed; `videos` {camera: its
    files}, `images` {camera: its parquet column}; `task_column` is None where rows have no
    task; `prompt_separator` splits one text into alternatives.
    """

    dataset: str
    root: Path
    episodes: EpisodeTable
    data_files: FileTable
    videos: Mapping[str, FileTable]
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

    @property
    def columns(self) -> list[str]:
        """The parquet columns of a window."""
        names = [c.name for c in (*self.state, *self.actions)]
        names += [*self.prompt_columns, *self.images.values()]
        names += [self.task_column] if self.task_column else []
        return names + (["timestamp"] if self.timed else [])

    def places(self, position: int) -> dict[str, tuple[Path, float]]:
        """{video camera: (mp4, seconds at which the episode starts in it)}."""
        table = self.episodes
        return {
            camera: (files.path(int(table.video_file[camera][position])), float(table.video_start[camera][position]))
            for camera, files in self.videos.items()
        }


@dataclass(frozen=True)
class EpisodeRows:
    """The rows of one episode: `state` [L, S] and `actions` [L, A] f32, `seconds` [L] f64 since the episode's
    start in its videos (None where nothing needs them), `prompts[prompt_code[f]]` for row f, `images` {camera: L
    encoded images}."""

    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    seconds: NDArray[np.float64] | None
    prompt_code: NDArray[np.int64]
    prompts: list[tuple[str, ...]]
    images: Mapping[str, pa.Array]


def stack_columns(rows: pa.Table, columns: tuple[Column, ...]) -> NDArray[np.float32]:
    """[L, D] f32: the columns side by side. Raises `RowError`."""
    parts = [numbers(rows, c.name, c.dim) for c in columns]
    return np.concatenate(parts, axis=1) if parts else np.zeros((rows.num_rows, 0), np.float32)


class LeRobotCursorFactory:
    """A worker's open files of one dataset. `frames_decoded` counts over all its cursors."""

    def __init__(self, reading: Reading, window: WindowSpec):
        self.reading, self.window = reading, window
        self.pool = VideoPool()
        self.rows = RowReader(reading.data_files.path, reading.columns)
        self.resizers = {camera: Resizer(window.image_size) for camera in reading.cameras}
        self.step = row_step(reading.fps, window.fps)
        self.held = np.repeat([not c.continuous for c in reading.actions], [c.dim for c in reading.actions])
        self.num_cursors = 0

    @property
    def frames_decoded(self) -> int:
        return self.pool.frames_decoded

    def cursor(self) -> LeRobotCursor:
        self.num_cursors += 1
        return LeRobotCursor(self)

    def close(self) -> None:
        self.pool.close()
        self.rows.close()


class LeRobotCursor:
    """Reads one window at a time; keeps the episode's rows and each camera's last images, all that the history of the
    next frame may ask for, and its next few."""

    def __init__(self, factory: LeRobotCursorFactory):
        self._factory, self._reading, self._window = factory, factory.reading, factory.window
        self._videos: dict[str, FrameCursor] = {camera: factory.pool.cursor() for camera in self._reading.videos}
        # {camera: {frame of the episode: its picture}}: what the next history needs, and what a burst read ahead.
        self._rings: dict[str, dict[int, NDArray[np.uint8]]] = {c: {} for c in self._reading.cameras}
        self._episode = -1
        self._rows: EpisodeRows | None = None
        self._places: dict[str, tuple[Path, float]] = {}  # {camera: the episode's mp4 and start in it}
        self._due: dict[str, int] = {}  # {camera: the frame after the last decoded one}
        self._number = factory.num_cursors

    def read(self, episode: int, frame: int, ahead: int = 0) -> RawWindow:
        """See `opentau_train.data.source.Cursor`. The arrays belong to the caller."""
        length = int(self._reading.episodes.length[episode])
        if not 0 <= frame < length:
            raise IndexError(f"frame {frame} of an episode of {length}")
        try:
            rows = self._enter(episode)
            images = {camera: self._images(camera, frame, ahead) for camera in self._reading.cameras}
        except (RowError, VideoError, ImageError) as error:
            episode_index = int(self._reading.episodes.episode_index[episode])
            raise BadSample(self._reading.dataset, episode_index, frame, str(error)) from error
        window, step = self._window, self._factory.step
        if step == 1.0:  # the rows themselves: nothing to place between them
            actions, is_pad = next_rows(rows.actions, frame, window.chunk_length)
        else:
            between = chunk_places(frame, window.chunk_length, step, rows.seconds, window.fps)
            actions, is_pad = rows_at(rows.actions, between, self._factory.held)
        return RawWindow(images, rows.state[frame].copy(), actions, is_pad, rows.prompts[rows.prompt_code[frame]])

    def close(self) -> None:
        for cursor in self._videos.values():
            cursor.close()
        self._videos = {}
        self._leave()

    def _leave(self) -> None:
        self._episode, self._rows = -1, None
        self._due.clear()
        for ring in self._rings.values():
            ring.clear()

    def _enter(self, episode: int) -> EpisodeRows:
        if episode != self._episode or self._rows is None:
            self._leave()
            self._rows = load_rows(self._factory.rows, self._reading, episode)
            self._places = self._reading.places(episode)
            self._episode = episode
        return self._rows

    def _images(self, camera: str, frame: int, ahead: int) -> NDArray[np.uint8]:
        """[h+1, H', W', 3] uint8 of the window at `frame` of the present episode; the caller's own.

        Where the history steps over frames they are kept too: the next window's history is made of them, and asking
        the decoder for them then would take it back.
        """
        ring, history = self._rings[camera], self._window.history
        if history == 0:
            self._fill(camera, frame, ahead)
            return ring.pop(frame)[None]  # handed over, not copied
        wanted = history_rows(frame, history, self._factory.step).tolist()
        for f in range(wanted[0], frame + 1):
            self._fill(camera, f, ahead + frame - f)
        for old in [f for f in ring if f < wanted[0]]:
            del ring[old]
        return np.stack([ring[f] for f in wanted])

    def _fill(self, camera: str, frame: int, ahead: int) -> None:
        """Bring `frame` into the camera's ring, and where reading goes on up to `ahead` of the next ones.

        A few at once, while the decoder's state is in the processor's cache: with hundreds of lanes taking turns it
        leaves it between two frames, which costs up to half of their decoding again.
        """
        ring = self._rings[camera]
        if frame in ring:
            return
        if self._window.history == 0:
            ring.clear()  # of what was skipped
        if frame != self._due.get(camera):
            for later in [f for f in ring if f > frame]:
                del ring[later]
            ahead = 0
        self._due[camera] = frame + 1
        if camera not in self._videos:
            ring[frame] = self._factory.resizers[camera](self._still(camera, frame))
            return
        # A burst ends at a frame number of the lane's own: lanes advance together, and would else all decode theirs in
        # the same step.
        left_in_burst = BURST - 1 - (frame + self._number) % BURST
        count = 1 + min(ahead, left_in_burst)
        for f, image in enumerate(self._decoded(camera, frame, count), start=frame):
            ring[f] = image
            self._due[camera] = f + 1

    def _decoded(self, camera: str, first: int, count: int) -> Iterator[NDArray[np.uint8]]:
        """[H', W', 3] uint8 of frames `first`.. of the present episode; fewer than `count` where a later one can't be
        had, which its own window's reading will find."""
        rows, (path, start), resizer = self._rows, self._places[camera], self._factory.resizers[camera]
        assert rows is not None and rows.seconds is not None, "rows of a source with videos have timestamps"
        seconds = (start + rows.seconds[first : first + count]).tolist()
        images = resizer.all(self._videos[camera].read_all(path, seconds, self._reading.tolerance_s), count)
        yield next(images)
        try:
            yield from images
        except VideoError:
            return

    def _still(self, camera: str, frame: int) -> av.VideoFrame:
        """One frame of the present episode that is stored as an image."""
        reading, rows = self._reading, self._rows
        assert rows is not None, "an image belongs to the episode entered before"
        try:
            pixels = decode_image(_encoded(rows.images[camera][frame].as_py(), reading.root))
        except (ImageError, OSError) as error:
            path = reading.data_files.path(int(reading.episodes.data_file[self._episode]))
            raise ImageError(f"{path}: column '{reading.images[camera]}': {error}") from error
        return av.VideoFrame.from_ndarray(pixels, "rgb24")


def load_rows(reader: RowReader, reading: Reading, position: int) -> EpisodeRows:
    """The rows of the episode at `position` of the table. Raises `RowError` naming the file."""
    table = reading.episodes
    file = int(table.data_file[position])
    rows = reader.read(
        file, int(table.row_start[position]), int(table.length[position]), int(table.episode_index[position])
    )
    try:
        code, prompts = _prompts(rows, reading)
        return EpisodeRows(
            stack_columns(rows, reading.state),
            stack_columns(rows, reading.actions),
            numbers(rows, "timestamp", 1, np.float64)[:, 0] if reading.timed else None,
            code,
            prompts,
            {camera: one_array(rows.column(column)) for camera, column in reading.images.items()},
        )
    except RowError as error:
        raise RowError(f"{reading.data_files.path(file)}: {error}") from error


def _prompts(rows: pa.Table, reading: Reading) -> tuple[NDArray[np.int64], list[tuple[str, ...]]]:
    """(code [L], texts by code): rows of an episode share few combinations of texts and task."""
    columns = [texts(rows, name) for name in reading.prompt_columns]
    codes = [code for code, _ in columns]
    if reading.task_column:
        codes.append(numbers(rows, reading.task_column, 1, np.int64)[:, 0])
    if not codes:
        return np.zeros(rows.num_rows, np.int64), [()]
    distinct, code = np.unique(np.stack(codes, axis=1), axis=0, return_inverse=True)
    prompts = []
    for combination in distinct.tolist():
        found = [known[c] for (_, known), c in zip(columns, combination) if c >= 0]
        chosen = _clean(found, reading.prompt_separator)
        if not chosen and reading.task_column:
            if combination[-1] not in reading.tasks:
                raise RowError(f"{reading.task_column} {combination[-1]} is not in the dataset's tasks")
            chosen = _clean([reading.tasks[combination[-1]] or ""], reading.prompt_separator)
        prompts.append(chosen)
    return code.reshape(-1), prompts


def _clean(found: list[str], separator: str | None) -> tuple[str, ...]:
    parts = [part for text in found for part in (text.split(separator) if separator else [text])]
    return tuple(part.strip() for part in parts if part.strip())


def _encoded(cell: Any, root: Path) -> bytes:
    """The encoded image of a parquet cell: bytes, or {bytes, path} with one of both."""
    if isinstance(cell, Mapping):
        if cell.get("bytes") is None and cell.get("path"):
            return (root / cell["path"]).read_bytes()
        cell = cell.get("bytes")
    if not isinstance(cell, bytes):
        raise ImageError("it has no image bytes")
    return cell
