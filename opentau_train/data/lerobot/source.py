"""LeRobot datasets, formats v3.0 and v2.1, as a `Source`.

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
    NUMBER,
    Column,
    choose_cameras,
    choose_numbers,
    choose_texts,
    dimension_names,
    frame_size,
    left_out,
)
from opentau_train.data.lerobot.cursor import LeRobotCursorFactory
from opentau_train.data.lerobot.episodes import Episodes, FileTable, read_episodes, read_tasks
from opentau_train.data.lerobot.identity import identify
from opentau_train.data.lerobot.info import Info, read_info
from opentau_train.data.lerobot.rows import Reading, stack_columns
from opentau_train.data.lerobot.select import filter_blocks, kept_positions, wanted_columns
from opentau_train.data.source import UNKNOWN_ROBOT
from opentau_train.errors import UserError, did_you_mean
from opentau_train.types import EpisodeTable, WindowSpec

log = logging.getLogger(__name__)

DEFAULT_CONTROL_MODE = "default"
CONTROL_MODE_COLUMN = "control_mode"


def whole_episodes(length: NDArray[np.int32]) -> NDArray[np.int32]:
    """[N, 3] int32 blocks (position, 0, length): every episode in one run."""
    return np.stack([np.arange(len(length)), np.zeros(len(length)), length], axis=1).astype(np.int32)


@dataclass(frozen=True)
class LeRobotSource:
    """See `opentau_train.data.source.Source`. Metadata only: picklable, and nothing is open."""

    name: str
    settings: SourceSettings
    root: Path
    robot_type: str
    fps: float
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    fingerprint: str
    rows_stamp: str
    reading: Reading
    blocks: NDArray[np.int32]
    frame_sizes: dict[str, tuple[int, int]]

    @classmethod
    def open(cls, name: str, settings: SourceSettings, root: Path) -> LeRobotSource:
        """Read the metadata of the dataset in `root`. Raises `UserError` for what is missing, broken or unknown."""
        where = f"data.sources.{name}"
        root = Path(root)
        info = read_info(root, where)
        features = info.features
        cameras = choose_cameras(features, settings.cameras, f"{where}.cameras")
        state, actions = _state_and_actions(info, settings)
        prompts = choose_texts(features, settings.prompt_columns, f"{where}.prompt_columns")
        videos = _videos(info, cameras)
        images = {camera: c for camera, c in cameras.items() if camera not in videos}
        tasked = "task_index" in features

        listed = read_episodes(info, videos.values(), wanted_columns(settings, where))
        table, data_files, video_files = _episode_table(info, listed, videos)
        keep = kept_positions(info, listed, table, data_files, settings)
        table = table.select(keep)
        extra = {name: [values[i] for i in keep] for name, values in listed.extra.items()}
        table = _with_control_mode(table, info, settings, extra.get(settings.control_mode_column), data_files)
        if settings.use_filter_dict:
            blocks = filter_blocks(info, extra, listed.names, table, data_files, settings)
        else:
            blocks = whole_episodes(table.length)
        fps = float(info.get("fps"))
        by_time = settings.fps is not None and features.get("timestamp", {}).get("dtype") in NUMBER
        reading = Reading(
            dataset=name,
            root=root,
            episodes=table,
            data_files=data_files,
            videos=video_files,
            images=images,
            cameras=tuple(cameras),
            state=state,
            actions=actions,
            prompt_columns=prompts,
            prompt_separator=settings.prompt_separator,
            task_column="task_index" if tasked else None,
            tasks=read_tasks(info) if tasked else {},
            tolerance_s=settings.tolerance_s,
            fps=fps,
            timed=bool(videos) or by_time,
        )
        fingerprint, rows_stamp = identify(info, table, data_files, video_files)
        return cls(
            name=name,
            settings=settings,
            root=root,
            robot_type=settings.robot_type or info.tree.get("robot_type") or UNKNOWN_ROBOT,
            fps=fps,
            state_names=dimension_names(features, state),
            action_names=dimension_names(features, actions),
            fingerprint=fingerprint,
            rows_stamp=rows_stamp,
            reading=reading,
            blocks=blocks,
            frame_sizes={camera: frame_size(features[column]) for camera, column in videos.items()},
        )

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
        return LeRobotCursorFactory(self.reading, window)

    def columns(self, positions: NDArray[np.int64]) -> Iterator[tuple[int, NDArray, NDArray]]:
        """See `Source.columns`; episodes come in the order of the files. Raises `UserError` naming the file."""
        reading, table = self.reading, self.episodes
        names = [c.name for c in (*reading.state, *reading.actions)]
        positions = np.asarray(positions, np.int64)
        ordered = positions[np.lexsort((table.row_start[positions], table.data_file[positions]))].tolist()

        def take(rows: pa.Table) -> tuple[NDArray, NDArray]:
            return stack_columns(rows, reading.state), stack_columns(rows, reading.actions)

        where = f"data.sources.{self.name}"
        found = rows.of_episodes(where, reading.data_files, table, ordered, names, take)
        for position, (state, actions) in found:
            yield position, state, actions


def _state_and_actions(info: Info, settings: SourceSettings) -> tuple[tuple[Column, ...], tuple[Column, ...]]:
    """The columns of both, with a warning of what an unset choice passes over. Raises `UserError`."""
    where = info.where
    state = choose_numbers(info.features, settings.state, "observation.state", f"{where}.state")
    actions = choose_numbers(info.features, settings.actions, "action", f"{where}.actions")
    if not actions:
        raise UserError("the dataset has no actions", where=str(info.path), remedy=f"set {where}.actions=[COLUMN]")
    if settings.state is None:
        _warn_of_left_out(info, f"{where}.state", "observation.state", state)
    if settings.actions is None:
        _warn_of_left_out(info, f"{where}.actions", "action", actions)
    return state, actions


def _warn_of_left_out(info: Info, key: str, whole: str, chosen: tuple[Column, ...]) -> None:
    """Say where the choice made for the unset `key` leaves columns of numbers out, or found none."""
    names = left_out(info.features, whole)
    if names:
        all_of_them = ",".join([*(c.name for c in chosen), *names])
        log.warning("%s: left out, having no floats: %s; %s=[%s] takes them", key, ", ".join(names), key, all_of_them)
    elif not chosen:
        log.warning("%s: the dataset has no %s; %s=[COLUMN,...] takes other columns", key, whole, key)


def _videos(info: Info, cameras: Mapping[str, str]) -> dict[str, str]:
    """Those of the `cameras` {name: column} that are video. Raises `UserError` where rows can't say which frame is
    theirs."""
    videos = {camera: c for camera, c in cameras.items() if info.features[c]["dtype"] == "video"}
    if videos and info.features.get("timestamp", {}).get("dtype") not in NUMBER:
        raise UserError(
            "the dataset has video, but meta/info.json lists no 'timestamp' of numbers, which tells each row's frame",
            where=str(info.path),
            remedy=f"export the dataset with timestamps, or leave its video out: {info.where}.cameras=[]",
        )
    return videos


def _episode_table(
    info: Info, listed: Episodes, videos: dict[str, str]
) -> tuple[EpisodeTable, FileTable, dict[str, FileTable]]:
    """The table of all episodes, still without control modes, and the files that it numbers."""
    data_files, data_file = _number_files(info, "data_path", listed.chunk, listed.file)
    files, numbers, starts = {}, {}, {}
    for camera, column in videos.items():
        chunk, file, starts[camera] = listed.videos[column]
        files[camera], numbers[camera] = _number_files(info, "video_path", chunk, file, column)
    table = EpisodeTable(
        listed.episode_index,
        listed.length.astype(np.int32),
        np.zeros(len(listed.length), np.int16),
        (DEFAULT_CONTROL_MODE,),
        data_file,
        listed.row_start,
        numbers,
        starts,
    )
    return table, data_files, files


def _number_files(
    info: Info, key: str, chunk: NDArray[np.int64], file: NDArray[np.int64], video_key: str = ""
) -> tuple[FileTable, NDArray[np.int32]]:
    pairs, number = np.unique(np.stack([chunk, file]), axis=1, return_inverse=True)
    files = FileTable(info.root, str(info.get(key)), pairs[0], pairs[1], video_key)
    try:
        files.relative(0)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{key} '{files.template}' can't be filled in: {error}",
            where=str(info.path),
            remedy="use LeRobot's placeholders: chunk_index, file_index, episode_chunk, episode_index, video_key",
        ) from error
    return files, number.reshape(-1).astype(np.int32)


def _with_control_mode(
    table: EpisodeTable, info: Info, settings: SourceSettings, extra: list | None, data_files: FileTable
) -> EpisodeTable:
    column = settings.control_mode_column
    same = settings.control_mode or info.tree.get("control_mode")
    if same:
        modes = [str(same)] * len(table)
    elif extra is not None:
        modes = [str(mode) if mode else DEFAULT_CONTROL_MODE for mode in extra]
    elif column in info.features:
        modes = _modes_in_rows(table, column, data_files, info.where)
    elif column != CONTROL_MODE_COLUMN:
        raise UserError(
            f"'{column}' is not in the dataset{did_you_mean(column, info.features)}",
            where=f"{info.where}.control_mode_column",
            remedy=f"name a column of the dataset, or set {info.where}.control_mode=NAME",
        )
    else:
        modes = [DEFAULT_CONTROL_MODE] * len(table)
    known, code = np.unique(modes, return_inverse=True)
    return replace(table, control_mode=code.astype(np.int16), control_modes=tuple(str(k) for k in known))


def _modes_in_rows(table: EpisodeTable, column: str, data_files: FileTable, where: str) -> list[str]:
    """Each episode's text in the data column; 'mixed' where it changes inside the episode."""

    def take(rows: pa.Table) -> str:
        code, known = texts(rows, column)
        distinct = {known[c] if c >= 0 else DEFAULT_CONTROL_MODE for c in np.unique(code)}
        return distinct.pop() if len(distinct) == 1 else "mixed"

    found = rows.of_episodes(where, data_files, table, range(len(table)), [column], take)
    return [mode for _, mode in found]
