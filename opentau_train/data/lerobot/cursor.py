"""Reading windows of a LeRobot dataset inside one worker process: rows from parquet, frames from mp4 or parquet."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import av
import numpy as np
from numpy.typing import NDArray

from opentau_train.data.chunk import chunk_places, next_rows, row_step, rows_at
from opentau_train.data.decode.images import DepthError, ImageError, Resizer, decode_image
from opentau_train.data.decode.parquet import RowError
from opentau_train.data.decode.video import BURST, FrameCursor, TimeError, VideoPool
from opentau_train.data.decode.video_file import DepthVideoError, VideoError
from opentau_train.data.lerobot.locate import EpisodeReader
from opentau_train.data.lerobot.near_frames import future_rows, history_rows
from opentau_train.data.lerobot.rows import EpisodeRows, Reading, check_finite, encoded
from opentau_train.data.lerobot.shared_rows import SharedRows, windows_of
from opentau_train.data.lerobot.spans import FrameTimes, Span, enough, frame_times
from opentau_train.data.remote.mirror import opener_at
from opentau_train.data.source import Cursor
from opentau_train.data.transforms.base import Record
from opentau_train.errors import BadSample, check_machine
from opentau_train.types import RawWindow, WindowSpec

log = logging.getLogger(__name__)


class LeRobotCursorFactory:
    """Makes the cursors of one dataset in one worker process, and holds the files that they share. `frames_decoded`
    counts over all its cursors."""

    def __init__(self, reading: Reading, window: WindowSpec):
        self.reading, self.window = reading, window
        self.opener = opener_at(reading.root)
        self.pool = VideoPool(self.opener, window.decoding)
        self.reader = EpisodeReader(reading.stored, reading.columns)
        self.rows = SharedRows(reading, self.reader)
        self.frame_s = 1.0 / reading.fps
        self.resizers = {camera: Resizer(window.image_size, window.scaling) for camera in reading.cameras}
        self.step = row_step(reading.fps, window.fps)
        held = np.repeat([not c.continuous for c in reading.actions], [c.dim for c in reading.actions])
        self.held = held[reading.actions_kept]
        self.num_cursors = 0
        self.told_of_excess = False

    @property
    def frames_decoded(self) -> int:
        return self.pool.frames_decoded

    def cursor(self) -> LeRobotCursor:
        self.num_cursors += 1
        return LeRobotCursor(self)

    def close(self) -> None:
        self.pool.close()
        self.rows.clear()
        self.reader.close()

    def gather(self, cursors: Sequence[Cursor], episodes: Sequence[int], frames: NDArray[np.int64]) -> Record | None:
        """See `opentau_train.data.load.together.Gathering`."""
        if self.reading.cameras or self.window.fps is not None:
            return None
        try:
            rows = [cast(LeRobotCursor, own).enter(at) for own, at in zip(cursors, episodes, strict=True)]
        except RowError:
            return None
        return windows_of(rows, frames, self.window.chunk_length)


class LeRobotCursor:
    """Reads one window at a time. Keeps the episode's rows and, of each camera, the images that the next windows may be
    made of, and the few that were decoded ahead."""

    def __init__(self, factory: LeRobotCursorFactory):
        self._factory, self._reading, self._window = factory, factory.reading, factory.window
        self._videos: dict[str, FrameCursor] = {camera: factory.pool.cursor() for camera in self._reading.stored.videos}
        # {camera: {frame of the episode: its picture}}: what the next history needs, and what was read ahead, for a
        # future or in a burst.
        self._rings: dict[str, dict[int, NDArray[np.uint8]]] = {c: {} for c in self._reading.cameras}
        self._episode = -1
        self._rows: EpisodeRows | None = None
        self._frames: dict[str, tuple[Span, FrameTimes]] = {}  # {camera: where the episode's frames are}
        self._due: dict[str, int] = {}  # {camera: the frame after the last decoded one}
        self._number = factory.num_cursors

    def read(self, episode: int, frame: int, ahead: int = 0, *, future: bool = False) -> RawWindow:
        """See `opentau_train.data.source.Cursor`. The arrays belong to the caller."""
        length = int(self._reading.episodes.length[episode])
        if not 0 <= frame < length:
            raise IndexError(f"frame {frame} of an episode of {length}")
        try:
            rows = self.enter(episode)
            actions, is_pad = self._actions(rows, frame)
            if not rows.finite:
                check_finite(self._reading, rows.state[frame], actions)
            now, (later, later_is_pad) = self._earlier(rows, frame), self._later(rows, frame) if future else ([], None)
            of_all = {camera: now + later * (camera in self._window.future_cameras) for camera in self._reading.cameras}
            images = {camera: self._images(camera, wanted, ahead) for camera, wanted in of_all.items()}
        except (RowError, VideoError, ImageError) as error:
            number = int(self._reading.episodes.episode_index[episode])
            raise BadSample(self._reading.dataset, number, frame, str(error), self._remedy(error)) from error
        extra: dict[str, Any] = {} if rows.weights is None else {"weight": float(rows.weights[frame])}
        if future:
            extra["future_is_pad"] = later_is_pad
        prompts = rows.prompts[rows.prompt_code[frame]]
        return RawWindow(images, rows.state[frame].copy(), actions, is_pad, prompts, extra)

    def _actions(self, rows: EpisodeRows, frame: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(actions [T, A] f32, is_pad [T]) of the window at `frame`."""
        num, fps = self._window.chunk_length, self._window.fps
        if fps is None:  # the rows themselves: nothing to place between them
            return next_rows(rows.actions, frame, num)
        places = chunk_places(frame, num, self._factory.step, rows.seconds, fps)
        return rows_at(rows.actions, places, self._factory.held, self._window.between)

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

    def enter(self, episode: int) -> EpisodeRows:
        """The rows of the episode at `episode` of the table, which the next windows are of. Raises `RowError` and
        `VideoError`."""
        if episode != self._episode or self._rows is None:
            self._leave()
            self._rows = self._factory.rows.at(episode)
            self._frames = {c: self._locate(c, span) for c, span in self._reading.spans(episode).items()}
            self._episode = episode
        return self._rows

    def _locate(self, camera: str, span: Span) -> tuple[Span, FrameTimes]:
        """Where the frames of the present rows are in the file of `span`. Raises `VideoError`."""
        clock, frame_s = self._videos[camera].clock(span.path), self._factory.frame_s
        times = frame_times(span, self._seconds, clock, frame_s, self._reading.tolerance_s)
        if times.excess > 1.5 * frame_s and not self._factory.told_of_excess:
            self._factory.told_of_excess = True
            log.warning(
                "%s lasts %.2f s longer than the episodes that meta/ places in it: either one isn't listed, or one is "
                "longer than meta/ says, and those after it are shown pictures of an earlier time",
                span.path,
                times.excess,
            )
        return span, times

    @property
    def _seconds(self) -> NDArray[np.float64]:
        """[L] the times of the present episode's rows."""
        assert self._rows is not None and self._rows.seconds is not None, "rows of a source with videos have timestamps"
        return self._rows.seconds

    def _remedy(self, error: Exception) -> str:
        """What to do about an unreadable window, where its data say more than that it is unreadable."""
        reading, where = self._reading, f"data.sources.{self._reading.dataset}"
        if isinstance(error, DepthError | DepthVideoError):
            columns = [*reading.images.values(), *(v.files.video_key for v in reading.stored.videos.values())]
            others = [c for c in columns if f"'{c}'" not in str(error) and f"/{c}/" not in str(error)]
            return f"leave the camera out: {where}.cameras=[{','.join(others)}]"
        if not isinstance(error, TimeError):
            return ""
        drift = max(self.drifts().values())
        if drift <= self._reading.tolerance_s:  # a frame is missing, but for that the clocks agree
            return ""
        return (
            f"if the nearest frames are the right ones, {where}.tolerance_s={enough(drift)} takes them: the rows' "
            f"times miss the video's frames by up to {drift:.6f} s"
        )

    def drift_of(self, episode: int) -> float:
        """How far, at most, the frames of the episode at `episode` are from its rows' times, see `drifts`. Raises
        `RowError` and `VideoError`."""
        self.enter(episode)
        return max(self.drifts().values(), default=0.0)

    def drifts(self) -> dict[str, float]:
        """{camera: how far, at most, the present episode's rows are from the nearest frames}, in seconds; 0 where that
        is within the tolerance for all rows inside the video and the episode's span. Raises `VideoError`."""
        tolerance_s, frame_s = self._reading.tolerance_s, self._factory.frame_s
        worst = {}
        for camera, (span, times) in self._frames.items():
            cursor = self._videos[camera]
            drift = cursor.drift(span.path, times.seconds) + times.beyond
            clock, half = cursor.clock(span.path), frame_s / 2
            inside = (clock.first - half < times.seconds) & (times.seconds < clock.last + half) & (times.beyond == 0)
            if drift[inside].max(initial=0.0) > tolerance_s:
                # Clocks of two rates drift apart with time: up to half a frame, farther after the video's end.
                grown = drift.max() * (self._reading.episodes.length.max() - 1) / max(len(drift) - 1, 1)
                bounded = drift.max() <= frame_s / 2
                # Of float32, since the episode's start: half of what lies between two such numbers, twice.
                rounding = np.spacing(np.float32(self._seconds[-1]))
                worst[camera] = float(max(drift.max(), rounding, min(grown, frame_s / 2)) if bounded else grown)
            else:
                worst[camera] = 0.0
        return worst

    def _earlier(self, rows: EpisodeRows, frame: int) -> list[int]:
        """The h+1 frames of the window at `frame` up to its own."""
        if self._window.history == 0:
            return [frame]
        return history_rows(frame, self._window.history, self._factory.step, rows.seconds, self._window.fps).tolist()

    def _later(self, rows: EpisodeRows, frame: int) -> tuple[list[int], NDArray[np.bool_]]:
        """The F frames of its future, and which of them [F] lie past the episode's end."""
        stride, seconds = self._window.future_stride, rows.seconds
        steps = self._window.future * stride + 1
        places = chunk_places(frame, steps, self._factory.step, seconds, self._window.fps)[stride::stride]
        wanted, is_pad = future_rows(places, len(rows.state))
        return wanted.tolist(), is_pad

    def _images(self, camera: str, wanted: list[int], ahead: int) -> NDArray[np.uint8]:
        """[N, H', W', 3] uint8 of the frames `wanted` [N] of the present episode, of which the next `ahead` windows
        want the following ones; the caller's own.

        Where they step over frames these are kept too: the next windows are made of them, and asking the decoder for
        them then would take it back.
        """
        ring, last = self._rings[camera], wanted[-1]
        for old in [f for f in ring if f < wanted[0]]:
            del ring[old]
        for f in range(wanted[0], last + 1):
            if f not in ring:
                self._fill(camera, f, ahead + last - f)
        # Nobody writes into it: one picture is not copied, and may be asked for again.
        return ring[last][None] if len(wanted) == 1 else np.stack([ring[f] for f in wanted])

    def _fill(self, camera: str, frame: int, ahead: int) -> None:
        """Bring `frame` into the camera's ring, and where reading goes on up to `ahead` of the next ones.

        A few at once, while the decoder's state is in the processor's cache: with hundreds of lanes taking turns it
        leaves it between two frames, which costs up to half of their decoding again.
        """
        ring = self._rings[camera]
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
        (span, times), resizer = self._frames[camera], self._factory.resizers[camera]
        if times.lost[first]:
            raise VideoError(f"{span.path}: row {first} lies outside the episode's frames")
        good = ~times.lost[first : first + count]
        count = count if good.all() else int(np.argmin(good))
        seconds = times.seconds[first : first + count].tolist()
        between = times.low, times.high
        images = resizer.all(
            self._videos[camera].read_all(span.path, seconds, self._reading.tolerance_s, between), count
        )
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
            cell = rows.images[camera][frame].as_py()
            pixels = decode_image(encoded(cell, reading, self._factory.opener), self._window.decoding.max_pixels)
        except (ImageError, OSError) as error:
            check_machine(error)
            path = reading.stored.data.path(int(reading.stored.data_file[self._episode]))
            kind = type(error) if isinstance(error, ImageError) else ImageError
            raise kind(f"{path}: column '{reading.images[camera]}': {error}") from error
        return av.VideoFrame.from_ndarray(pixels, "rgb24")
