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

from opentau_train import strangers
from opentau_train.config.data import SourceSettings
from opentau_train.data.lerobot import rows
from opentau_train.data.lerobot.columns import (
    INTEGER,
    NUMBER,
    TEXT,
    Column,
    check_dropped,
    choose_cameras,
    choose_dimensions,
    choose_numbers,
    choose_texts,
    choose_weights,
    dimension_names,
    frame_size,
    left_out,
    named_so,
    unusable,
)
from opentau_train.data.lerobot.control_modes import DEFAULT_CONTROL_MODE, with_control_mode
from opentau_train.data.lerobot.cursor import LeRobotCursorFactory
from opentau_train.data.lerobot.episodes import Episodes, StoredEpisodes, read_episodes, read_tasks
from opentau_train.data.lerobot.files import number_files
from opentau_train.data.lerobot.identity import check_place, identify, stored_files
from opentau_train.data.lerobot.info import Info, read_info
from opentau_train.data.lerobot.keyframes import read_keyframes
from opentau_train.data.lerobot.locate import row_keys
from opentau_train.data.lerobot.modality import named_slices
from opentau_train.data.lerobot.options import LeRobotSource
from opentau_train.data.lerobot.presence import check_columns, check_rows, present_cameras, some, without_video
from opentau_train.data.lerobot.rows import Reading, state_and_actions
from opentau_train.data.lerobot.select import Listing, filter_blocks, kept_positions, wanted_columns
from opentau_train.data.lerobot.settle import cut, seen_rows, settle_lengths, tell_unlisted, video_places
from opentau_train.data.lerobot.stretches import read_in_stretches
from opentau_train.data.source import UNKNOWN_ROBOT, Keyframes, whole_episodes
from opentau_train.errors import UserError, did_you_mean
from opentau_train.types import EpisodeTable, WindowSpec

log = logging.getLogger(__name__)


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

    def keyframes(self, cache: Path) -> Keyframes | None:
        """See `VideoSource.keyframes`."""
        return read_keyframes(self.reading.stored, self.fps, self.fingerprint, cache)

    def files(self, position: int) -> list[Path]:
        """See `FileSource.files`."""
        return self.reading.stored.paths(position)

    def row_files(self) -> NDArray[np.int32] | None:
        """See `FiledSource.row_files`."""
        return self.reading.stored.row_files()

    def prompts(self, positions: NDArray[np.int64]) -> Iterator[str]:
        """See `PromptedSource.prompts`: all tasks that meta/ lists, or what the rows have in the columns of prompts."""
        return rows.read_prompts(self.reading, positions)

    def columns(self, positions: NDArray[np.int64]) -> Iterator[tuple[int, NDArray, NDArray]]:
        """See `Source.columns`; episodes come in the order of the files, without those whose rows aren't there, which
        the log names. Raises `UserError` naming the file."""
        reading, stored = self.reading, self.reading.stored
        names = [c.name for c in (*reading.state, *reading.actions)]
        positions = np.asarray(positions, np.int64)
        ordered, num = positions[np.lexsort((stored.row_start[positions], stored.data_file[positions]))], 0
        for position, (state, actions) in read_in_stretches(reading, ordered):
            num += 1
            yield position, state, actions

        def take(rows: pa.Table) -> tuple[NDArray, NDArray]:
            return state_and_actions(rows, reading)

        where, left_out = f"data.sources.{self.name}", dict[int, str]()
        rest = ordered[num:].tolist()
        for position, (state, actions) in rows.of_episodes(where, stored, rest, names, take, left_out=left_out):
            yield position, state, actions
        if left_out:
            episodes = some(self.episodes.episode_index[list(left_out)].tolist())
            cause = next(iter(left_out.values()))
            log.warning("%s: rows that can't be read: episodes %s (%s)", where, episodes, cause)


def open_dataset(name: str, settings: SourceSettings, options: LeRobotSource) -> LeRobotDataset:
    """Read the metadata of the dataset in `settings.root`. Raises `UserError` for what is missing, broken, unknown."""
    root, where = Path(settings.root or ""), f"data.sources.{name}"
    with strangers.understood("the dataset's metadata", root):
        info = read_info(root, where, options.links)
        for link in (str(info.path), *strangers.links(f"{info.root}/meta")):
            check_place(info, link)
        return _open(name, settings, options, info)


def _open(name: str, settings: SourceSettings, options: LeRobotSource, info: Info) -> LeRobotDataset:
    where = info.where
    features = info.features
    cameras = choose_cameras(features, options.cameras, f"{where}.cameras")
    state, actions = _state_and_actions(info, options)
    prompts = choose_texts(features, _prompt_columns(info, options), f"{where}.prompt_columns")
    for line in unusable(features, {c for c in (*cameras.values(), *(c.name for c in (*state, *actions)), *prompts)}):
        log.warning("%s: %s", where, line)
    state_names, state_kept = choose_dimensions(features, state, options.drop_dims)
    action_names, actions_kept = choose_dimensions(features, actions, options.drop_dims)
    check_dropped(options.drop_dims, dimension_names(features, (*state, *actions)), f"{where}.drop_dims")
    videos = _videos(info, cameras)
    tasked = "task_index" in features or any(features[name]["dtype"] in INTEGER for name in prompts)
    listing, cameras = _listing(info, settings, options, cameras, videos)
    stored = listing.stored
    files = stored_files(info, stored)
    check_rows(info, stored, files)
    lacking = without_video(info, stored, files)
    stored = replace(stored, table=replace(stored.table, lacking=lacking))
    blocks = filter_blocks(listing, settings) if settings.use_filter_dict else whole_episodes(stored.table.length)
    blocks = cut(blocks, seen_rows(listing, options.tolerance_s))
    fps = float(info.get("fps"))
    by_time = settings.fps is not None and features.get("timestamp", {}).get("dtype") in NUMBER
    reading = Reading(
        dataset=name,
        root=info.root,
        stored=stored,
        weight_column=choose_weights(features, options.weight_column, f"{where}.weight_column"),
        images={camera: column for camera, column in cameras.items() if camera not in videos},
        cameras=tuple(cameras),
        state=state,
        actions=actions,
        prompt_columns=prompts,
        prompt_separator=options.prompt_separator,
        task_column="task_index" if "task_index" in features else None,
        tasks=read_tasks(info, needed=not prompts) if tasked else {},
        tolerance_s=options.tolerance_s,
        fps=fps,
        timed=bool(stored.videos) or by_time,
        state_kept=state_kept,
        actions_kept=actions_kept,
        places=info.places,
    )
    check_columns(info, stored, [*row_keys(stored), *reading.columns], {*prompts, *reading.images.values()})
    fingerprint, rows_stamp = identify(info, stored, files)
    return LeRobotDataset(
        name=name,
        robot_type=settings.robot_type or str(info.tree.get("robot_type") or UNKNOWN_ROBOT),
        fps=fps,
        state_names=state_names,
        action_names=action_names,
        fingerprint=fingerprint,
        rows_stamp=rows_stamp,
        reading=reading,
        blocks=blocks,
        frame_sizes={camera: frame_size(features[videos[camera]]) for camera in stored.videos},
    )


def _listing(
    info: Info, settings: SourceSettings, options: LeRobotSource, cameras: dict[str, str], videos: dict[str, str]
) -> tuple[Listing, dict[str, str]]:
    """(the episodes that the settings choose, with the rows and control modes that the files tell; the `cameras`
    {name: column} that have files, `videos` being those stored as video). Raises `UserError`."""
    ends = [f"videos/{column}/to_timestamp" for column in videos.values()]
    listed = read_episodes(info, videos.values(), wanted_columns(settings, info.where), ["length", *ends])
    tell_unlisted(info, listed.episode_index)
    stored = replace(_stored(info, listed, videos), excluded=tuple(settings.exclude_episodes))
    stored = present_cameras(info, stored, videos, options.cameras is not None)
    listing = Listing(info, stored, listed.extra, listed.names, listed.told.get("length"))
    listing = settle_lengths(listing.select(kept_positions(listing, settings)))
    there = {c: column for c, column in cameras.items() if c in stored.videos or c not in videos}
    return with_control_mode(listing, settings), there


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
    if not named and "task_index" not in features:
        log.warning("%s: no prompts: meta/info.json lists no 'task_index', which tells each row's task", info.where)
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
    data, data_file = number_files(info, "data_path", listed.chunk, listed.file)
    places = {}
    for camera, column in videos.items():
        if column not in listed.videos:
            continue
        chunk, file, start = listed.videos[column]
        files, number = number_files(info, "video_path", chunk, file, column)
        to = listed.told.get(f"videos/{column}/to_timestamp", np.full(len(start), np.nan))
        places[camera] = video_places(info, listed, files, number, start, to)
    table = EpisodeTable(
        episode_index=listed.episode_index,
        length=listed.length.astype(np.int32),
        control_mode=np.zeros(len(listed.length), np.int16),
        control_modes=(DEFAULT_CONTROL_MODE,),
    )
    return StoredEpisodes(
        table,
        data,
        data_file,
        listed.row_start,
        places,
        rows_in_file=np.bincount(data_file, weights=listed.length, minlength=len(data)).astype(np.int64),
        shared_files=not info.file_an_episode,
        order=next((name for name in ("frame_index", "index") if name in info.features), None),
    )
