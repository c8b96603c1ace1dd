"""Reading windows of a LeRobot dataset inside one worker process: rows from parquet, frames from mp4 or parquet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from opentau_train.data.chunk import chunk_places, history_rows, next_rows, row_step, rows_at
from opentau_train.data.decode.images import ImageError, Resizer, decode_image
from opentau_train.data.decode.parquet import RowError, RowReader
from opentau_train.data.decode.video import BURST, FrameCursor, VideoPool
from opentau_train.data.decode.video_file import VideoError
from opentau_train.data.lerobot.rows import EpisodeRows, Reading, check_finite, load_rows
from opentau_train.errors import BadSample
from opentau_train.machine import check_machine
from opentau_train.types import RawWindow, WindowSpec


class LeRobotCursorFactory:
    """Makes the cursors of one dataset in one worker process, and holds the files that they share. `frames_decoded`
    counts over all its cursors."""

    def __init__(self, reading: Reading, window: WindowSpec):
        self.reading, self.window = reading, window
        self.pool = VideoPool()
        self.rows = RowReader(reading.stored.data.path, reading.columns)
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
    """Reads one window at a time. Keeps the episode's rows and, of each camera, the images that the next window's
    history may need and the few that were decoded ahead."""

    def __init__(self, factory: LeRobotCursorFactory):
        self._factory, self._reading, self._window = factory, factory.reading, factory.window
        self._videos: dict[str, FrameCursor] = {camera: factory.pool.cursor() for camera in self._reading.stored.videos}
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
            actions, is_pad = self._actions(rows, frame)
            if not rows.finite:
                check_finite(self._reading, rows.state[frame], actions)
            images = {camera: self._images(camera, frame, ahead) for camera in self._reading.cameras}
        except (RowError, VideoError, ImageError) as error:
            episode_index = int(self._reading.episodes.episode_index[episode])
            raise BadSample(self._reading.dataset, episode_index, frame, str(error)) from error
        return RawWindow(images, rows.state[frame].copy(), actions, is_pad, rows.prompts[rows.prompt_code[frame]])

    def _actions(self, rows: EpisodeRows, frame: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(actions [T, A] f32, is_pad [T]) of the window at `frame`."""
        num, fps = self._window.chunk_length, self._window.fps
        if fps is None:  # the rows themselves: nothing to place between them
            return next_rows(rows.actions, frame, num)
        return rows_at(
            rows.actions, chunk_places(frame, num, self._factory.step, rows.seconds, fps), self._factory.held
        )

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
        rows = self._rows
        assert rows is not None, "an image belongs to the episode entered before"
        wanted = history_rows(frame, history, self._factory.step, rows.seconds, self._window.fps).tolist()
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
            check_machine(error)
            path = reading.stored.data.path(int(reading.stored.data_file[self._episode]))
            raise ImageError(f"{path}: column '{reading.images[camera]}': {error}") from error
        return av.VideoFrame.from_ndarray(pixels, "rgb24")


def _encoded(cell: Any, root: Path) -> bytes:
    """The encoded image of a parquet cell: bytes, or {bytes, path} with one of both."""
    if isinstance(cell, Mapping):
        if cell.get("bytes") is None and cell.get("path"):
            return (root / cell["path"]).read_bytes()
        cell = cell.get("bytes")
    if not isinstance(cell, bytes):
        raise ImageError("it has no image bytes")
    return cell
