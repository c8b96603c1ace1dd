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
        stat.size >= 0
        for asked in (numbers[:1], numbers[1:])
        for stat in stats_below(info.root, [places.files.relative(number) for number in asked])
    )


def without_video(
    info: Info, stored: StoredEpisodes, files: Sequence[StoredFile], excluded: Iterable[int]
) -> NDArray[np.bool_]:
    """[E] whether a video of the episode is missing; logs which are, of each camera. `files` are those of `stored`.

    Raises `UserError` for git-lfs pointers, and for episodes without their file of rows, where each has its own;
    `excluded` ones are left out already.
    """
    small = [f"{info.root}/{file.relative}" for file in files if 0 <= file.stat.size < LFS_BYTES]
    pointers = [path for path in small if is_lfs_pointer(path)]
    if pointers:
        raise lfs_error(pointers[0], len(pointers) - 1)
    numbers = stored.table.episode_index
    missing = np.zeros(len(numbers), bool)
    kinds = [None, *stored.videos] if info.file_an_episode else [*stored.videos]
    for camera in kinds:
        gone = [file for file in files if file.camera == camera and file.stat.size < 0]
        if not gone:
            continue
        places = stored.data_file if camera is None else stored.videos[camera].file
        lost = np.isin(places, [file.number for file in gone])
        path = str(info.root / gone[0].relative)
        if camera is None:
            remedy = f"restore {'it' if len(gone) == 1 else 'them'}, or {exclude(info.where, excluded, numbers[lost])}"
            raise UserError(f"the rows of {episodes(numbers[lost])} are missing", where=path, remedy=remedy)
        log.warning(
            "%s: the video of camera '%s' is missing for %s (%d of %d rows), first %s: %s",
            info.where,
            camera,
            episodes(numbers[lost]),
            stored.table.length[lost].sum(),
            stored.table.length.sum(),
            path,
            exclude(info.where, excluded, numbers[lost]),
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


def exclude(where: str, excluded: Iterable[int], numbers: Iterable[int]) -> str:
    """What leaves the episodes `numbers` out, besides those that are `excluded` already."""
    listed = sorted({int(number) for number in (*excluded, *numbers)})
    return f"leave them out: {where}.exclude_episodes=[{','.join(map(str, listed))}]"
