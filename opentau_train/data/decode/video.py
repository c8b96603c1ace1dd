"""Frames of mp4 files by time, decoded once: many cursors move forward through files that they share.

A frame is found by its presentation time, never by `index / fps`: files hold many episodes, may have a variable
frame rate, B-frames (presentation order differs from storage order), edit lists, and any distance of keyframes.

`VideoPool` keeps one demuxer a file (`video_file.py`); each `FrameCursor` has its own decoder and a few packets ahead,
and takes the demuxer back to its own place when another cursor has moved it. Nothing here may be pickled or used after
a fork.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from opentau_train.data.decode.decoding import AS_USUAL, Decoding
from opentau_train.data.decode.fit import fit
from opentau_train.data.decode.open_files import OpenFiles
from opentau_train.data.decode.opening import Opener, open_here
from opentau_train.data.decode.video_file import Clock, Coding, VideoError, VideoFile, new_decoder
from opentau_train.errors import check_machine_read

ROUNDING_S = 1e-4
"""How far before a wanted time a frame may lie and still end the search: float32 timestamps and time bases round.
Only saves decoding the frame after it; the nearest frame is returned in any case."""

BURST = 16
"""Frames of a camera that a lane decodes at once where reading goes on: as many small pictures are kept."""

_HALF_TICK = 0.51
"""Of the file's time base, by which frame times are rounded: half a millisecond in Matroska."""

_DECODER_BYTES, _DECODER_BYTES_A_PIXEL = 600_000, 11


@dataclass(frozen=True)
class OpenDecoders:
    """How many decoders are open, and about the bytes that are held to read them (`reader_bytes`)."""

    num: int = 0
    num_bytes: int = 0

    def __add__(self, other: OpenDecoders) -> OpenDecoders:
        return OpenDecoders(self.num + other.num, self.num_bytes + other.num_bytes)

    def __sub__(self, other: OpenDecoders) -> OpenDecoders:
        return OpenDecoders(self.num - other.num, self.num_bytes - other.num_bytes)


def reader_bytes(frame: tuple[int, int], image: tuple[int, int], later: int = 0) -> int:
    """About what a lane holds to read one camera, (H, W) in the file and of the batch's images: a decoder (a fixed part
    and some seven pictures: a straight line through what h264 without and with B-frames and AV1 took at 192x320 to
    720x1280, 40 % off at most) and the pictures of a burst, and of `later` rows that a window's future reaches over."""
    if 0 in frame:  # the dataset doesn't say
        frame = image
    height, width = fit(*frame, image)
    return _DECODER_BYTES + _DECODER_BYTES_A_PIXEL * frame[0] * frame[1] + (BURST + later) * height * width * 3


class TimeError(VideoError):
    """No frame lies within the tolerance of a wanted time."""


EVER = (-math.inf, math.inf)
"""All of a file's frames."""


class VideoPool:
    """The files of one dataset that `opener` has opened in a worker process, at most as many as there are cursors, and
    fewer where the process's limit of open files is near. A closed one is opened again when it is asked for.
    `frames_decoded` counts the pictures that all cursors have sent to decoders."""

    def __init__(self, opener: Opener = open_here, decoding: Decoding = AS_USUAL):
        self.frames_decoded, self.decoding = 0, decoding
        self._files = OpenFiles[Path, VideoFile](
            lambda path: opener(path, partial(VideoFile, max_pixels=decoding.max_pixels)), 0
        )

    def __len__(self) -> int:
        return len(self._files)

    def cursor(self) -> FrameCursor:
        """A new cursor, for which one file more may stay open."""
        # Fewer files than cursors would be opened anew for every few packets when each cursor is in another file.
        self._files.capacity += 1
        return FrameCursor(self)

    def release(self) -> None:
        """A cursor was closed: keep one file fewer open."""
        self._files.capacity -= 1
        self._files.shrink(self._files.capacity)

    def get(self, path: Path) -> VideoFile:
        """The file, opened if it isn't. Raises `VideoError` and `av.FFmpegError`."""
        return self._files.get(path)

    def drop(self, path: Path) -> None:
        """Close a file whose demuxer may be in a bad state."""
        self._files.drop(path)

    def close(self) -> None:
        self._files.shrink(0)


class FrameCursor:
    """Reads frames of one camera, mostly forward; going back or far ahead seeks to a keyframe.

    The decoder stays when the cursor goes on in another file of the same coding: a heap in which decoders come and go
    without end grows by the gaps they leave (docs/decisions/0008).
    """

    def __init__(self, pool: VideoPool):
        self._pool = pool
        self._path: Path | None = None
        self._time_base = 1.0  # seconds a tick in the file
        self._decoder: av.VideoCodecContext | None = None
        self._coding: Coding | None = None  # what the decoder was made from; None where it can't be trusted any more
        self._forget()

    def read(self, path: Path, seconds: float, tolerance_s: float) -> av.VideoFrame:
        """The frame of `path` shown nearest to `seconds` (the file's own clock).

        Raises `VideoError` where none lies within `tolerance_s`, and where the file can't be read or decoded; the
        cursor can be used again after that. Raises `Fault` where the machine is to blame for it.
        """
        return next(self.read_all(path, (seconds,), tolerance_s))

    def read_all(
        self, path: Path, seconds: Iterable[float], tolerance_s: float, between: tuple[float, float] = EVER
    ) -> Iterator[av.VideoFrame]:
        """`read` for each of `seconds`, one after another; no other cursor of the pool may be used before it has ended.
        Raises as `read` does at the frame that can't be had, and for one that isn't shown in `between` (from, before);
        those before it have been given by then."""
        for wanted in seconds:
            try:
                self._enter(path)
                frame = self._nearest(wanted / self._time_base, ROUNDING_S / self._time_base)
            except (av.FFmpegError, OSError, MemoryError, VideoError) as error:
                self._path = self._coding = None
                self._pool.drop(path)
                check_machine_read(error, path)
                if isinstance(error, VideoError):
                    raise
                cause = error.strerror if isinstance(error, av.FFmpegError | OSError) else None
                raise VideoError(f"{path}: {cause or error}{self._pool.decoding.remark}") from error
            shown = _ticks(frame) * self._time_base
            if abs(shown - wanted) > max(tolerance_s, _HALF_TICK * self._time_base):
                raise TimeError(
                    f"{path} has no frame within {tolerance_s:g} s of {wanted:.6f} s: the nearest is at {shown:.6f} s"
                )
            if not between[0] <= shown < between[1]:
                raise VideoError(f"{path}: the frame nearest to {wanted:.6f} s, at {shown:.6f} s, is another episode's")
            yield frame

    def clock(self, path: Path) -> Clock:
        """Raises `VideoError`."""
        with _as_video_error(path):
            return self._pool.get(path).clock

    def drift(self, path: Path, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N] seconds from the nearest frame to each of `seconds` [N]. Raises `VideoError`."""
        with _as_video_error(path):
            file = self._pool.get(path)
            ticks = seconds / file.time_base
            shown = np.array(file.shown(math.floor(ticks.min()), math.ceil(ticks.max())), np.float64)
        if not len(shown):
            raise VideoError(f"{path} has no frames")
        place = np.searchsorted(shown, ticks)
        before, after = shown[np.maximum(place - 1, 0)], shown[np.minimum(place, len(shown) - 1)]
        return np.minimum(np.abs(ticks - before), np.abs(after - ticks)) * file.time_base

    def close(self) -> None:
        self._path = self._decoder = self._coding = None
        self._forget()
        self._pool.release()

    @property
    def _opened(self) -> av.VideoCodecContext:
        assert self._decoder is not None, "read() makes the decoder"
        return self._decoder

    @property
    def _file(self) -> VideoFile:
        """The file, open. Asked for only where packets are needed: it may have to be opened anew for them."""
        assert self._path is not None, "read() enters a file"
        return self._pool.get(self._path)

    def _enter(self, path: Path) -> None:
        if path is self._path or path == self._path:
            return
        file = self._pool.get(path)
        if self._coding != file.coding:
            self._decoder = new_decoder(file.coding, self._pool.decoding)
            self._coding = file.coding
        self._path, self._time_base = path, file.time_base
        self._forget()

    def _forget(self) -> None:
        self._packets: deque[av.Packet] = deque()
        self._frames: deque[av.VideoFrame] = deque()
        self._tail_dts: int | None = None  # the last packet taken from the demuxer
        self._fed_dts: int | None = None  # the last packet sent to the decoder
        self._key_delay = 0  # presentation minus decode time of the last keyframe
        self._drained = False
        self._cut_off: float = math.inf  # when the first picture is shown whose packet isn't whole
        self._before: av.VideoFrame | None = None
        self._latest: av.VideoFrame | None = None

    def _nearest(self, target: float, early: float) -> av.VideoFrame:
        if self._must_seek(target, early):
            self._seek(math.floor(target + early))
        while self._latest is None or _ticks(self._latest) < target - early:
            frame = self._next_frame()
            if frame is None:
                break
            self._before, self._latest = self._latest, frame
        if self._latest is None:
            raise VideoError(f"{self._path} has no frame at {target * self._time_base:.6f} s")
        if self._before is not None and target - _ticks(self._before) <= _ticks(self._latest) - target:
            return self._before
        return self._latest

    def _must_seek(self, target: float, early: float) -> bool:
        if self._latest is None or self._fed_dts is None:
            return True
        if target < _ticks(self._before or self._latest) - early:
            return True
        if target <= _ticks(self._latest) + early:
            return False
        if self._before is not None:
            interval = _ticks(self._latest) - _ticks(self._before)
            if target - _ticks(self._latest) <= 2 * interval:
                return False  # the next frame or the one after: no jump, and not worth a look into the index
        return self._file.skips_packets(self._fed_dts, target - self._key_delay)

    def _seek(self, ticks: int) -> None:
        self._forget()
        self._opened.flush_buffers()
        self._take(self._file.packets_from_keyframe(ticks))

    def _take(self, packets: list[av.Packet]) -> None:
        self._packets.extend(packets)
        if packets:
            self._tail_dts = packets[-1].dts

    def _next_frame(self) -> av.VideoFrame | None:
        """The next frame in presentation order; None at the end of the file."""
        while not self._frames:
            if self._drained:
                return None
            if not self._packets and self._tail_dts is not None:
                self._take(self._file.packets_after(self._tail_dts))
            if self._packets:
                self._feed(self._packets.popleft())
            else:
                self._drained = True
                self._frames.extend(self._opened.decode(None))
        frame = self._frames.popleft()
        if frame.pts is None:
            raise VideoError(f"{self._path}: a frame has no presentation time")
        if frame.is_corrupt or frame.pts >= self._cut_off:
            # What follows in its group of pictures is built on it, though the decoder doesn't mark that.
            raise VideoError(f"{self._path}: the frame at {frame.pts * self._time_base:.6f} s is damaged")
        return frame

    def _feed(self, packet: av.Packet) -> None:
        self._fed_dts = packet.dts
        if packet.is_corrupt and packet.pts is not None:  # a truncated file's last; not every decoder notices
            self._cut_off = min(self._cut_off, packet.pts)
        if packet.is_keyframe:
            if packet.pts is not None and packet.dts is not None:
                self._key_delay = packet.pts - packet.dts
            if packet.has_sidedata("new_extradata"):
                self._coding = None  # the file changes its coding on the way: no decoder for another file
        self._pool.frames_decoded += 1
        self._frames.extend(self._opened.decode(packet))


@contextmanager
def _as_video_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        check_machine_read(error, path)
        raise VideoError(f"{path}: {error.strerror or error}") from error


def _ticks(frame: av.VideoFrame) -> int:
    """When the frame is shown; `FrameCursor._next_frame` refuses frames that don't say it."""
    assert frame.pts is not None
    return frame.pts
