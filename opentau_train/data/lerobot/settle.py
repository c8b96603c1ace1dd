"""What a dataset's metadata can't be right about, settled before training: how many rows an episode has, and which rows
have no frame of their own. Each is told in the log, and only what can't be read is left out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opentau_train.data.decode.parquet import RowError
from opentau_train.data.decode.video_file import Clock, VideoError
from opentau_train.data.lerobot.episodes import Episodes, VideoPlaces
from opentau_train.data.lerobot.files import FileTable
from opentau_train.data.lerobot.info import Info
from opentau_train.data.lerobot.locate import EpisodeReader
from opentau_train.data.lerobot.presence import NAMED, some
from opentau_train.data.lerobot.rows import of_episodes, row_seconds
from opentau_train.data.lerobot.select import Listing
from opentau_train.data.lerobot.spans import F64, boundaries, frame_times
from opentau_train.errors import UserError

log = logging.getLogger(__name__)


def tell_unlisted(info: Info, episode_index: NDArray[np.int64]) -> None:
    """Say which episodes info.json counts and the episodes' metadata don't list: where they are nobody knows."""
    total = info.tree.get("total_episodes")
    if isinstance(total, int) and len(episode_index) < total:
        listed = set(episode_index[episode_index < total].tolist())
        missing = list(islice((number for number in range(total) if number not in listed), NAMED))
        more = total - len(listed) - len(missing)
        named = some(missing) + (f" and {more} more" if more else "")
        log.warning("%s: left out, missing in the episodes' metadata: episodes %s", info.where, named)


def settle_lengths(listing: Listing) -> Listing:
    """The listing with as many rows an episode as the files have where `length` and the range of rows differ, and
    without the episodes that have none. Raises `UserError` where nothing is left."""
    stored, where = listing.stored, listing.info.where
    length, numbers = stored.table.length.copy(), stored.table.episode_index
    told = length if listing.told is None else listing.told
    disputed = np.flatnonzero((length <= 0) | (told != length)).tolist()
    if not disputed:
        return listing
    reader, causes = EpisodeReader(stored, []), {}
    for position in disputed:
        try:
            length[position] = reader.count(position)
        except RowError as error:
            length[position], causes[position] = 0, str(error)
    reader.close()
    taken = ", ".join(f"{numbers[e]}: {length[e]}" for e in disputed[:NAMED] if length[e])
    if taken:
        more = f" and {len(disputed) - NAMED} more" if len(disputed) > NAMED else ""
        log.warning("%s: length isn't to - from; rows as the files have them: episodes %s%s", where, taken, more)
    if not length.all():
        gone = numbers[length == 0].tolist()
        log.warning(
            "%s: left out, having no rows: episodes %s %s", where, some(gone), "; ".join([*causes.values()][:1])
        )
    if not length.any():
        remedy = "restore the files of rows (download or export the dataset again)"
        raise UserError("no episode has rows", where=where, remedy=remedy)
    listing = replace(listing, stored=replace(stored, table=replace(stored.table, length=length)))
    return listing.select(np.flatnonzero(length))


def seen_rows(listing: Listing, tolerance_s: float) -> NDArray[np.int64]:
    """[E, 2] (first, end): the rows of each episode that have frames in all cameras, as far as metadata tell it; says
    which have none.

    Where they tell that a row may have none, the row's own time decides: only these episodes' times are read.
    """
    stored, info = listing.stored, listing.info
    frame_s = 1.0 / float(info.get("fps"))
    seen = np.stack([np.zeros(len(stored.table), np.int64), stored.table.length.astype(np.int64)], axis=1)
    lines = []
    for camera, places in stored.videos.items():
        last = places.start + (stored.table.length - 1) * frame_s
        doubtful = np.flatnonzero((last > places.end - frame_s / 2) | (places.start < places.first - frame_s / 2))
        lost: dict[int, int] = {}
        for position, seconds in _times(listing, doubtful):
            span = places.span(position)
            clock = Clock(
                span.claimed[0], span.claimed[1] - frame_s, span.rows
            )  # the file's own is known where it is read
            try:
                times = frame_times(span, seconds, clock, frame_s, max(tolerance_s, frame_s / 2))
                with_frame = np.flatnonzero(~times.lost)
            except VideoError:
                with_frame = np.zeros(0, np.int64)
            if len(with_frame) < len(seconds):
                lost[position] = len(seconds) - len(with_frame)
                first, end = (with_frame[0], with_frame[-1] + 1) if len(with_frame) else (0, 0)
                seen[position] = max(seen[position, 0], first), min(seen[position, 1], end)
        if lost:
            episodes = some(stored.table.episode_index[list(lost)].tolist())
            cause = "their times lie outside the episode's from_timestamp to to_timestamp"
            lines.append(f"  {camera}  episodes {episodes}  {sum(lost.values())} rows  {cause}")
    if lines:
        log.warning("%s: left out, having no frame of their own:\n%s", info.where, "\n".join(lines))
    return seen


def _times(listing: Listing, positions: NDArray[np.int64]) -> Iterator[tuple[int, F64]]:
    """(position, seconds [L]) of the episodes whose rows can be had; the others are told when they are read."""

    def take(rows: pa.Table) -> F64 | None:
        try:
            return row_seconds(rows)
        except RowError:
            return None

    pairs = of_episodes(listing.info.where, listing.stored, positions.tolist(), ["timestamp"], take, left_out={})
    return ((position, seconds) for position, seconds in pairs if seconds is not None)


def video_places(
    info: Info, listed: Episodes, files: FileTable, file: NDArray[np.int32], start: F64, to: F64
) -> VideoPlaces:
    """Where the frames are of episodes that lie in `files` from `start` to `to` (NaN: not told), seconds [E]."""
    frame_s = 1.0 / float(info.get("fps"))
    length_s: F64 = (listed.length * frame_s).astype(np.float64)
    if info.file_an_episode:
        claimed = np.stack([start, start + length_s], axis=1)
        ever = np.full(len(start), np.inf)
        return VideoPlaces(files, file, start, -ever, ever, claimed, listed.length, np.zeros(len(start), np.int64))
    _tell_gaps(f"{info.where}, {files.video_key}", listed.episode_index, start, to, file, frame_s)
    first, end = boundaries(file, start, to, length_s, frame_s)
    least, greatest = np.full(len(files), np.inf), np.full(len(files), -np.inf)
    np.minimum.at(least, file, start)
    np.maximum.at(greatest, file, np.where(to > start, to, start + length_s))
    claimed = np.stack([least[file], greatest[file]], axis=1)
    rows_in_file = np.bincount(file, weights=listed.length).astype(np.int64)
    return VideoPlaces(files, file, start, first, end, claimed, rows_in_file[file], np.bincount(file)[file])


def _tell_gaps(what: str, episode_index: NDArray[np.int64], start: F64, to: F64, file: NDArray, frame_s: float) -> None:
    """Say where an episode doesn't begin in its video at the `to` [E] of the one before it. `what` names the camera."""
    follows = (np.diff(episode_index) == 1) & (np.diff(file) == 0) & (to[:-1] > start[:-1])
    gap = np.where(follows, start[1:] - np.where(follows, to[:-1], 0.0), 0.0)
    apart = np.flatnonzero(np.abs(gap) > frame_s / 2)
    if len(apart):
        log.warning(
            "%s: from_timestamp isn't the to_timestamp before it, so pictures may be frames off: episodes %s (%+.3f s)",
            *(what, some(episode_index[apart + 1].tolist()), gap[apart[0]]),
        )


def cut(blocks: NDArray[np.int32], seen: NDArray[np.int64]) -> NDArray[np.int32]:
    """`blocks` [N, 3] (position, first frame, length) without the rows outside `seen` [E, 2]."""
    position, start, length = blocks.astype(np.int64).T
    first = np.maximum(start, seen[position, 0])
    end = np.minimum(start + length, seen[position, 1])
    kept = np.stack([position, first, end - first], axis=1)
    return kept[end > first].astype(np.int32)
