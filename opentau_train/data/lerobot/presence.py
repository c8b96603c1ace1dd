"""Whether the files that a LeRobot dataset's metadata speak of are there: told when the dataset is opened."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.lerobot.episodes import StoredEpisodes, VideoPlaces
from opentau_train.data.lerobot.identity import StoredFile, stats_below
from opentau_train.data.lerobot.info import LFS_BYTES, Info, is_lfs_pointer, lfs_error
from opentau_train.data.lerobot.locate import EpisodeReader
from opentau_train.errors import UserError

log = logging.getLogger(__name__)

NAMED = 8
"""How many episodes a line names."""


def present_cameras(info: Info, stored: StoredEpisodes, videos: dict[str, str], chosen: bool) -> StoredEpisodes:
    """`stored` without the cameras of which no file exists, with a line for each. `videos` {camera: column} are those
    that info.json lists as video; `chosen` says that the settings name them.

    Raises `UserError` where such a camera is named, or no camera with video is left.
    """
    gone = [c for c in videos if c not in stored.videos or not _any_file(info, stored.videos[c])]
    if not gone:
        return stored
    key, rest = f"{info.where}.cameras", [videos[c] for c in videos if c not in gone]
    names = ", ".join(f"'{videos[camera]}'" for camera in gone)
    what = f"meta/info.json lists the video of {names}, but there is no file of it"
    if chosen or not rest:
        raise UserError(
            what, where=str(info.root), remedy=f"download its videos, or leave it out: {key}=[{','.join(rest)}]"
        )
    log.warning("%s: %s: left out", key, what)
    return replace(stored, videos={c: places for c, places in stored.videos.items() if c not in gone})


def _any_file(info: Info, places: VideoPlaces) -> bool:
    """Whether a file of the camera exists; the first one, as a rule."""
    numbers = range(len(places.files))
    return any(
        stat.size > 0
        for asked in (numbers[:1], numbers[1:])
        for stat in stats_below(info.root, [places.files.relative(number) for number in asked])
    )


def check_rows(info: Info, stored: StoredEpisodes, files: Sequence[StoredFile]) -> None:
    """Raises `UserError` for git-lfs pointers, for episodes whose file of rows is missing and which no other file has,
    and for columns that no file of rows has. `files` are those of `stored`."""
    small = [f"{info.root}/{file.relative}" for file in files if 0 <= file.stat.size < LFS_BYTES]
    pointers = [path for path in small if is_lfs_pointer(path)]
    if pointers:
        raise lfs_error(pointers[0], len(pointers) - 1)
    gone = [file for file in files if file.camera is None and file.stat.size <= 0]
    if not gone:
        return
    reader = EpisodeReader(stored, [])
    doubtful = np.flatnonzero(np.isin(stored.data_file, [file.number for file in gone]))
    lost = stored.table.episode_index[[e for e in doubtful.tolist() if not reader.is_anywhere(e)]]
    reader.close()
    if len(lost):
        remedy = f"restore {'it' if len(gone) == 1 else 'them'}{or_exclude(info.where, stored, lost)}"
        path = str(info.root / gone[0].relative)
        raise UserError(f"the rows of {episodes(lost)} are missing", where=path, remedy=remedy)


def without_video(info: Info, stored: StoredEpisodes, files: Sequence[StoredFile]) -> NDArray[np.bool_]:
    """[E] whether a video of the episode is missing; logs which are, of each camera. `files` are those of `stored`."""
    numbers = stored.table.episode_index
    missing = np.zeros(len(numbers), bool)
    for camera, places in stored.videos.items():
        gone = [file for file in files if file.camera == camera and file.stat.size <= 0]
        if not gone:
            continue
        lost = np.isin(places.file, [file.number for file in gone])
        log.warning(
            "%s: the video of camera '%s' is missing for %s (%d of %d rows), first %s%s",
            info.where,
            camera,
            episodes(numbers[lost]),
            stored.table.length[lost].sum(),
            stored.table.length.sum(),
            info.root / gone[0].relative,
            or_exclude(info.where, stored, numbers[lost]),
        )
        missing |= lost
    return missing


def episodes(numbers: Sequence[int] | NDArray[np.int64]) -> str:
    """Their numbers as text, the first few of many."""
    return f"episode{'s' * (len(numbers) > 1)} {some(numbers)}"


def some(numbers: Iterable[int]) -> str:
    """The first of the numbers, and how many more there are."""
    ordered = sorted(int(number) for number in numbers)
    more = f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else ""
    return ", ".join(map(str, ordered[:NAMED])) + more


def or_exclude(where: str, stored: StoredEpisodes, numbers: Iterable[int]) -> str:
    """A remedy's second half: what leaves the episodes `numbers` out, besides those that are left out already; nothing
    where no episode would be left."""
    lost = {int(number) for number in numbers}
    if len(lost) == len(stored.table):
        return ""
    listed = ",".join(map(str, sorted({*stored.excluded, *lost})))
    them = "them" if len(lost) > 1 else "it"
    return f", or leave {them} out: {where}.exclude_episodes=[{listed}]"
