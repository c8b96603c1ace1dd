"""LeRobot datasets, formats v3.0, v2.1 and v2.0, as a `Source`: what `LeRobotSource.open` gives.

Metadata is read once, when the source is opened; files of rows and frames are opened by the cursors, in the
process that uses them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opentau_train.config.data import SourceSettings
from opentau_train.data.decode.parquet import texts
from opentau_train.data.lerobot import rows
from opentau_train.data.lerobot.columns import (
    INTEGER,
    NUMBER,
    TEXT,
    Column,
    choose_cameras,
    choose_numbers,
    choose_texts,
    dimension_names,
    frame_size,
    left_out,
    named_so,
)
from opentau_train.data.lerobot.cursor import LeRobotCursorFactory
from opentau_train.data.lerobot.episodes import (
    Episodes,
    FileTable,
    StoredEpisodes,
    VideoPlaces,
    read_episodes,
    read_tasks,
)
from opentau_train.data.lerobot.identity import identify, stored_files
from opentau_train.data.lerobot.info import Info, read_info
from opentau_train.data.lerobot.modality import named_slices
from opentau_train.data.lerobot.options import LeRobotSource
from opentau_train.data.lerobot.presence import present_cameras, without_video
from opentau_train.data.lerobot.rows import Reading, stack_columns
from opentau_train.data.lerobot.select import Listing, filter_blocks, kept_positions, wanted_columns
from opentau_train.data.source import UNKNOWN_ROBOT, whole_episodes
from opentau_train.errors import UserError, did_you_mean
from opentau_train.types import EpisodeTable, WindowSpec

log = logging.getLogger(__name__)

DEFAULT_CONTROL_MODE = "default"


@dataclass(frozen=True)
class LeRobotDataset:
    """A LeRobot dataset, as `opentau_train.data.source.Source` asks. Metadata only: picklable, and no file is open."""

    name: str
    robot_type: str
    fps: float
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    fingerprint: str
    rows_stamp: str
    reading: Reading
    blocks: NDArray[np.int32]
    frame_sizes: dict[str, tuple[int, int]]

    @property
    def episodes(self) -> EpisodeTable:
        return self.reading.episodes

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.reading.cameras

    def get_shuffle_blocks(self) -> NDArray[np.int32]:
        """See `Source.get_shuffle_blocks`: whole episodes, or the runs that the keep-ranges filter leaves."""
        return self.blocks

    def cursors(self, window: WindowSpec) -> LeRobotCursorFactory:
        """See `Source.cursors`."""
        return LeRobotCursorFactory(self.reading, window)

    def columns(self, positions: NDArray[np.int64]) -> Iterator[tuple[int, NDArray, NDArray]]:
        """See `Source.columns`; episodes come in the order of the files. Raises `UserError` naming the file."""
        reading, stored = self.reading, self.reading.stored
        names = [c.name for c in (*reading.state, *reading.actions)]
        positions = np.asarray(positions, np.int64)
        ordered = positions[np.lexsort((stored.row_start[positions], stored.data_file[positions]))].tolist()

        def take(rows: pa.Table) -> tuple[NDArray, NDArray]:
            return stack_columns(rows, reading.state), stack_columns(rows, reading.actions)

        where = f"data.sources.{self.name}"
        for position, (state, actions) in rows.of_episodes(where, stored, ordered, names, take):
            yield position, state, actions


def open_dataset(name: str, settings: SourceSettings, options: LeRobotSource) -> LeRobotDataset:
    """Read the metadata of the dataset in `settings.root`. Raises `UserError` for what is missing, broken, unknown."""
    where = f"data.sources.{name}"
    info = read_info(Path(settings.root or ""), where)
    features = info.features
    cameras = choose_cameras(features, options.cameras, f"{where}.cameras")
    state, actions = _state_and_actions(info, options)
    prompts = choose_texts(features, _prompt_columns(info, options), f"{where}.prompt_columns")
    videos = _videos(info, cameras)
    tasked = "task_index" in features or any(features[name]["dtype"] in INTEGER for name in prompts)
    listed = read_episodes(info, videos.values(), wanted_columns(settings, where))
    stored = present_cameras(info, _stored(info, listed, videos), videos, options.cameras is not None)
    cameras = {c: column for c, column in cameras.items() if c in stored.videos or c not in videos}
    listing = Listing(info, stored, listed.extra, listed.names)
    listing = _with_control_mode(listing.select(kept_positions(listing, settings)), settings)
    stored = listing.stored
    files = stored_files(info, stored)
    lacking = without_video(info, stored, files, settings.exclude_episodes)
    stored = replace(stored, table=replace(stored.table, lacking=lacking))
    blocks = filter_blocks(listing, settings) if settings.use_filter_dict else whole_episodes(stored.table.length)
    fps = float(info.get("fps"))
    by_time = settings.fps is not None and features.get("timestamp", {}).get("dtype") in NUMBER
    reading = Reading(
        dataset=name,
        root=info.root,
        stored=stored,
        images={camera: column for camera, column in cameras.items() if camera not in videos},
        cameras=tuple(cameras),
        state=state,
        actions=actions,
        prompt_columns=prompts,
        prompt_separator=options.prompt_separator,
        task_column="task_index" if "task_index" in features else None,
        tasks=read_tasks(info) if tasked else {},
        tolerance_s=options.tolerance_s,
        fps=fps,
        timed=bool(stored.videos) or by_time,
    )
    fingerprint, rows_stamp = identify(info, stored, files)
    return LeRobotDataset(
        name=name,
        robot_type=settings.robot_type or str(info.tree.get("robot_type") or UNKNOWN_ROBOT),
        fps=fps,
        state_names=dimension_names(features, state),
        action_names=dimension_names(features, actions),
        fingerprint=fingerprint,
        rows_stamp=rows_stamp,
        reading=reading,
        blocks=blocks,
        frame_sizes={camera: frame_size(features[videos[camera]]) for camera in stored.videos},
    )


def _state_and_actions(info: Info, options: LeRobotSource) -> tuple[tuple[Column, ...], tuple[Column, ...]]:
    """The columns of both, with a warning of what an unset choice passes over. Raises `UserError`."""
    where = info.where
    state_key, actions_key = f"{where}.state", f"{where}.actions"
    slices = named_slices(info, "state", options.state or (), state_key)
    state = choose_numbers(info.features, options.state, "observation.state", state_key, slices)
    slices = named_slices(info, "action", options.actions or (), actions_key)
    actions = choose_numbers(info.features, options.actions, "action", actions_key, slices)
    if not actions:
        remedy = named_so(info.features, "action", actions_key)
        raise UserError("the dataset has no actions", where=str(info.path), remedy=remedy)
    if options.state is None:
        _warn_of_left_out(info, state_key, "observation.state", state)
    if options.actions is None:
        _warn_of_left_out(info, actions_key, "action", actions)
    return state, actions


def _prompt_columns(info: Info, options: LeRobotSource) -> tuple[str, ...]:
    """The text columns to read: those that are named or, with `optional_prompts`, those of them that are there, none
    where the tasks stand in; a warning names what is missing."""
    named, features = options.prompt_columns, info.features
    there = tuple(column for column in named if column in features)
    if len(there) == len(named) or not options.optional_prompts or not (there or "task_index" in features):
        return named
    missing = [column for column in named if column not in features]
    near = did_you_mean(missing[0], (c for c, feature in features.items() if feature.get("dtype") in TEXT))
    prompts = ", ".join(there) or "the dataset's tasks"
    log.warning("%s.prompt_columns: there is no %s%s; prompts: %s", info.where, ", ".join(missing), near, prompts)
    return there


def _warn_of_left_out(info: Info, key: str, whole: str, chosen: tuple[Column, ...]) -> None:
    """Say where the choice made for the unset `key` leaves columns of numbers out, or found none."""
    names = left_out(info.features, whole)
    if names:
        all_of_them = ",".join([*(c.name for c in chosen), *names])
        log.warning("%s: left out, having no floats: %s; %s=[%s] takes them", key, ", ".join(names), key, all_of_them)
    elif not chosen:
        log.warning("%s: the dataset has no %s; %s", key, whole, named_so(info.features, whole, key))


def _videos(info: Info, cameras: Mapping[str, str]) -> dict[str, str]:
    """The `cameras` {name: column} that are stored as video. Raises `UserError` where rows don't say which frame
    belongs to them."""
    videos = {camera: c for camera, c in cameras.items() if info.features[c]["dtype"] == "video"}
    if videos and info.features.get("timestamp", {}).get("dtype") not in NUMBER:
        raise UserError(
            "the dataset has video, but meta/info.json lists no 'timestamp' of numbers, which tells each row's frame",
            where=str(info.path),
            remedy=f"export the dataset with timestamps, or leave its video out: {info.where}.cameras=[]",
        )
    return videos


def _stored(info: Info, listed: Episodes, videos: Mapping[str, str]) -> StoredEpisodes:
    """All episodes, still without control modes, and the files that hold them; `videos` {camera: column}."""
    data, data_file = _number_files(info, "data_path", listed.chunk, listed.file)
    places = {}
    for camera, column in videos.items():
        if column not in listed.videos:
            continue
        chunk, file, start = listed.videos[column]
        places[camera] = VideoPlaces(*_number_files(info, "video_path", chunk, file, column), start)
    table = EpisodeTable(
        episode_index=listed.episode_index,
        length=listed.length.astype(np.int32),
        control_mode=np.zeros(len(listed.length), np.int16),
        control_modes=(DEFAULT_CONTROL_MODE,),
    )
    return StoredEpisodes(table, data, data_file, listed.row_start, places)


def _number_files(
    info: Info, key: str, chunk: NDArray[np.int64], file: NDArray[np.int64], video_key: str = ""
) -> tuple[FileTable, NDArray[np.int32]]:
    pairs, number = np.unique(np.stack([chunk, file]), axis=1, return_inverse=True)
    files = FileTable(info.root, str(info.get(key)), pairs[0], pairs[1], video_key)
    try:
        if "\0" in files.relative(0):
            raise ValueError("it holds a null character")
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{key} '{files.template}' can't be filled in: {error}",
            where=str(info.path),
            remedy="use LeRobot's placeholders: chunk_index, file_index, episode_chunk, episode_index, video_key",
        ) from error
    return files, number.reshape(-1).astype(np.int32)


def _with_control_mode(listing: Listing, settings: SourceSettings) -> Listing:
    """The listing with the control mode of each episode. Raises `UserError` for a column that isn't there."""
    info, stored, column = listing.info, listing.stored, settings.control_mode_column
    same = settings.control_mode or info.tree.get("control_mode")
    if same:
        modes = [str(same)] * len(stored.table)
    elif column in listing.extra:
        modes = [str(mode) if mode else DEFAULT_CONTROL_MODE for mode in listing.extra[column]]
    elif column in info.features:
        modes = _modes_in_rows(stored, column, info.where)
    elif column != SourceSettings.control_mode_column:
        raise UserError(
            f"'{column}' is not in the dataset{did_you_mean(column, info.features)}",
            where=f"{info.where}.control_mode_column",
            remedy=f"name a column of the dataset, or set {info.where}.control_mode=NAME",
        )
    else:
        modes = [DEFAULT_CONTROL_MODE] * len(stored.table)
    known, code = np.unique(modes, return_inverse=True)
    table = replace(stored.table, control_mode=code.astype(np.int16), control_modes=tuple(str(k) for k in known))
    return replace(listing, stored=replace(stored, table=table))


def _modes_in_rows(stored: StoredEpisodes, column: str, where: str) -> list[str]:
    """Each episode's text in the data column; 'mixed' where it changes inside the episode."""

    def take(rows: pa.Table) -> str:
        code, known = texts(rows, column)
        distinct = {known[c] if c >= 0 else DEFAULT_CONTROL_MODE for c in np.unique(code)}
        return distinct.pop() if len(distinct) == 1 else "mixed"

    everywhere = range(len(stored.table))
    return [mode for _, mode in rows.of_episodes(where, stored, everywhere, [column], take)]
