"""Whether the files that a LeRobot dataset's metadata speak of are there: told when the dataset is opened."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opentau_train import strangers
from opentau_train.data.decode.parquet import UNREADABLE, is_list
from opentau_train.data.lerobot.episodes import StoredEpisodes, VideoPlaces
from opentau_train.data.lerobot.identity import StoredFile, stats_below
from opentau_train.data.lerobot.info import LFS_BYTES, RESTORE, Info, is_lfs_pointer, lfs_error
from opentau_train.data.lerobot.locate import EpisodeReader
from opentau_train.data.remote.mirror import mirror_at
from opentau_train.errors import UserError, check_machine_read

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
    """Raises `UserError` for git-lfs pointers, and for episodes whose file of rows is missing and which no other file
    has. `files` are those of `stored`."""
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


def check_columns(info: Info, stored: StoredEpisodes, columns: Sequence[str], others: Collection[str]) -> None:
    """Raises `UserError` for one of `columns` that neither the first nor the last file of rows has, or that holds no
    numbers there and isn't among the `others`. A file that can't be read, or lies on a server, is the reading's to
    tell."""
    if mirror_at(info.root) is not None:
        return
    paths = {stored.data.path(int(stored.data_file[place])): None for place in (0, -1)}
    schemas = {path: schema for path in paths if (schema := _schema(path)) is not None}
    for column in columns:
        wrong = {path: _wrong_column(schema, column, column in others) for path, schema in schemas.items()}
        if wrong and all(wrong.values()):
            path, what = next(iter(wrong.items()))
            remedy = f"correct meta/info.json, which says so of '{column}', or {RESTORE}"
            raise UserError(f"the files of rows have {what}", where=str(path), remedy=remedy)


def _schema(path: Path) -> pa.Schema | None:
    try:
        strangers.check_plain(path)
        return pq.read_schema(path)
    except UNREADABLE as error:
        check_machine_read(error, path)
        return None


def _wrong_column(schema: pa.Schema, column: str, is_other: bool) -> str:
    """What is wrong with the column of a file of rows; nothing where it can be read."""
    count = schema.names.count(column)
    if count != 1:
        return f"{'more than one' if count else 'no'} column '{column}'"
    kind = schema.field(column).type
    while is_list(kind):
        kind = kind.value_type
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    encoded = isinstance(kind, pa.BaseExtensionType) or pa.types.is_dictionary(kind)  # of what, only values tell
    return "" if is_other or number or encoded else f"a column '{column}' of {kind}, not of numbers"


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
