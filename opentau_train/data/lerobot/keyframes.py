"""At which frames of its episodes a dataset's videos can be entered: their keyframes.

Read from the files' own indices, without a packet, and kept in the cache by the dataset's fingerprint: 4 bytes a
keyframe. A wrong keyframe would cost decoding and change no picture, so that of many files some stand for all.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from opentau_train.data.decode.video_file import VideoError, VideoFile
from opentau_train.data.lerobot.episodes import StoredEpisodes, VideoPlaces
from opentau_train.data.remote.mirror import mirror_at
from opentau_train.data.source import Keyframes
from opentau_train.errors import UserError, check_machine, check_machine_read

log = logging.getLogger(__name__)

F64 = NDArray[np.float64]

VERSION = 1
SAMPLED = 8
"""Files of each camera that are read to find the one with the fewest keyframes."""
MANY = 512
"""Files of a camera that are read, evenly chosen, where it has more: if a keyframe comes as regularly in all of these,
the others are taken to be alike."""
_ALIKE = 0.3
"""Of a frame: how far a keyframe may be from the time of the row whose picture it is."""


def read_keyframes(stored: StoredEpisodes, fps: float, fingerprint: str, cache: Path) -> Keyframes | None:
    """The keyframes of the camera that has the fewest: a lane decodes all cameras of an episode from the same frame on.
    None of a dataset without videos, and of one on a server, whose files are not fetched for it, unless `cache` knows
    them from a copy.

    Raises `UserError` where they can't be stored in `cache`.
    """
    if not stored.videos:
        return None
    digest = hashlib.blake2b(f"{VERSION} {fingerprint} {list(stored.videos)}".encode(), digest_size=16).hexdigest()
    path = cache / "keyframes" / f"{digest}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as columns:
                return Keyframes(columns["ends"], columns["frame"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            log.warning("%s can't be read, and the videos' keyframes are read again: %s", path, error)
    if mirror_at(stored.data.root) is not None:
        return None
    found, whole = _of_episodes(_sparsest(stored.videos), stored.table.length, fps)
    if whole:
        _store(path, found)
    return found


def _store(path: Path, found: Keyframes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            np.savez(Path(folder) / path.name, **found._asdict())
            os.replace(Path(folder) / path.name, path)
    except OSError as error:
        check_machine(error, path.parent)
        remedy = "set paths.cache_dir to a directory that you can write"
        raise UserError(f"the keyframes can't be stored: {error}", where=str(path.parent), remedy=remedy) from error


def _sparsest(videos: Mapping[str, VideoPlaces]) -> VideoPlaces:
    """Of the camera that has the fewest keyframes in a few of its files."""
    if len(videos) == 1:
        return next(iter(videos.values()))

    def rate(places: VideoPlaces) -> float:
        files, rows = _evenly(np.unique(places.file), SAMPLED), np.bincount(places.file, places.rows)
        shared = np.bincount(places.file, np.ones(len(places.file)))
        return sum(len(_of_file(places, f)) for f in files) / max(
            1.0, float((rows / np.maximum(shared, 1))[files].sum())
        )

    return min(videos.values(), key=rate)


def _evenly(files: NDArray, num: int) -> list[int]:
    """At most `num` of the files, evenly chosen, the first and the last among them."""
    return files[np.unique(np.linspace(0, len(files) - 1, num).astype(np.int64))].tolist()


def _of_file(places: VideoPlaces, number: int) -> F64:
    """[K] seconds from the file's first frame to each keyframe; none of a file that can't be read, whose windows will
    say why."""
    path = places.files.path(number)
    try:
        file = VideoFile(path)
        try:
            return file.keyframes
        finally:
            file.close()
    except (VideoError, av.FFmpegError, OSError) as error:
        check_machine_read(error, path)
        return np.zeros(0)


def _of_episodes(places: VideoPlaces, length: NDArray[np.int32], fps: float) -> tuple[Keyframes, bool]:
    """The keyframes of episodes of `length` [E] rows whose frames are at `places`, and whether all files that were
    looked at could be read; one that couldn't is taken to have one only."""
    used = np.unique(places.file)
    read = {number: _of_file(places, number) for number in _evenly(used, MANY)}
    period = _period(list(read.values()), fps)
    if len(read) < len(used) and period is None:
        read = {number: _of_file(places, number) for number in used.tolist()}
    whole = all(len(seconds) for seconds in read.values())
    read = {number: seconds if len(seconds) else np.zeros(1) for number, seconds in read.items()}
    begins, lasts = places.start - places.claimed[:, 0], length / fps
    frames = []
    for file, begin, last in zip(places.file.tolist(), begins.tolist(), lasts.tolist(), strict=True):
        seconds = read.get(file)
        if seconds is None:
            assert period is not None, "the other files are like those that were read"
            seconds = np.arange(0.0, begin + last, period)
        first = max(int(np.searchsorted(seconds, begin + _ALIKE / fps, side="right")) - 1, 0)
        end = np.searchsorted(seconds, begin + last - _ALIKE / fps)
        frames.append(np.ceil((seconds[first : max(end, first + 1)] - begin) * fps - _ALIKE).astype(np.int32))
    ends = np.cumsum([len(f) for f in frames], dtype=np.int64)
    return Keyframes(ends, np.concatenate(frames) if frames else np.zeros(0, np.int32)), whole


def _period(files: list[F64], fps: float) -> float | None:
    """The seconds from one keyframe to the next where they are the same in all `files`; else None."""
    apart = np.concatenate([np.diff(seconds) for seconds in files])
    if not len(apart) or np.ptp(apart) > _ALIKE / fps:
        return None
    return float(np.median(apart))
