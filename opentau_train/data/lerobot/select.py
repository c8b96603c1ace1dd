"""Which episodes and windows of a LeRobot dataset are used: episode lists, success, the keep-ranges filter.

What a setting names is looked for among the episodes' metadata (columns of meta/episodes, fields of episodes.jsonl),
else in one row of each episode.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opentau_train.config.data import SourceSettings
from opentau_train.data import keep_ranges
from opentau_train.data.chunk import chunk_rows, row_step
from opentau_train.data.decode.parquet import one_array
from opentau_train.data.lerobot import rows
from opentau_train.data.lerobot.episodes import Episodes, FileTable
from opentau_train.data.lerobot.info import Info
from opentau_train.errors import UserError, did_you_mean
from opentau_train.types import EpisodeTable

log = logging.getLogger(__name__)


def wanted_columns(settings: SourceSettings, where: str) -> list[str]:
    """The per-episode columns that the settings may ask for."""
    names = [settings.control_mode_column]
    names += [settings.success_column] if settings.success_only else []
    return names + (list(keep_ranges.template_fields(settings.filter_key, where)) if settings.use_filter_dict else [])


def kept_positions(
    info: Info, listed: Episodes, table: EpisodeTable, files: FileTable, settings: SourceSettings
) -> NDArray[np.int64]:
    """Positions of the episodes that `episodes`, `exclude_episodes` and `success_only` leave. Raises `UserError` for
    unknown episodes or columns, and where nothing is left."""
    where = info.where
    keep = np.ones(len(table), bool)
    numbers = table.episode_index
    for key, wanted in (("episodes", settings.episodes), ("exclude_episodes", settings.exclude_episodes)):
        unknown = set(wanted or ()) - set(numbers.tolist())
        if unknown:
            raise UserError(
                f"episode {min(unknown)} is not in the dataset",
                where=f"{where}.{key}",
                remedy=f"the dataset has {len(numbers)} episodes, {numbers[0]} to {numbers[-1]}",
            )
    if settings.episodes is not None:
        keep &= np.isin(numbers, settings.episodes)
    keep &= ~np.isin(numbers, settings.exclude_episodes)
    if settings.success_only:
        chosen = np.flatnonzero(keep)
        good = _succeeded(info, listed, table, chosen, files, settings)
        log.info("data.sources.%s: success_only keeps %d of %d episodes", table_name(where), good.sum(), len(chosen))
        keep[chosen[~good]] = False
    if not keep.any():
        raise UserError(
            "no episode is left", where=where, remedy=f"change {where}.episodes, .exclude_episodes or .success_only"
        )
    return np.flatnonzero(keep)


def table_name(where: str) -> str:
    """The source's name in `data.sources.NAME`."""
    return where.rpartition(".")[2]


def filter_blocks(
    info: Info,
    extra: dict[str, list[Any]],
    names: tuple[str, ...],
    table: EpisodeTable,
    files: FileTable,
    settings: SourceSettings,
) -> NDArray[np.int32]:
    """[N, 3] int32 blocks that the keep-ranges filter leaves of the episodes of `table`; logs what it did.

    `extra` {column: a value an episode of `table`}. Raises `UserError` (see `keep_ranges.read` and `.check`).
    """
    where = info.where
    if settings.filter_rule == "whole" and settings.chunk_length is None:
        raise UserError(
            "filter_rule=whole needs to know the chunk",
            where=f"{where}.filter_rule",
            remedy=f"set {where}.chunk_length",
        )
    filter = keep_ranges.read(Path(settings.filter_dict_path or "").expanduser(), where, settings.filter_trim_tail)
    if filter.by_number and settings.filter_key == SourceSettings.filter_key:
        filter = filter.numbered()
        keys = [str(number) for number in table.episode_index.tolist()]
    else:
        fields = keep_ranges.template_fields(settings.filter_key, where)
        columns = {name: _values(info, extra, names, table, name, 0, files, "filter_key") for name in fields}
        keys = keep_ranges.fill_template(settings.filter_key, columns, len(table))
    rows = chunk_rows(settings.chunk_length or 1, row_step(float(info.get("fps")), settings.fps))
    blocks, report = keep_ranges.apply(filter, keys, table.length, rule=settings.filter_rule, rows=rows)
    keep_ranges.check(filter, keys, report, settings.filter_min_match, where)
    log.info(report.text(table_name(where), filter))
    return blocks


def _succeeded(
    info: Info,
    listed: Episodes,
    table: EpisodeTable,
    chosen: NDArray[np.int64],
    files: FileTable,
    settings: SourceSettings,
) -> NDArray[np.bool_]:
    """[len(chosen)] whether each of the episodes at `chosen` is a success: its own column, or its last row's."""
    column = settings.success_column
    extra = {name: [values[i] for i in chosen] for name, values in listed.extra.items()}
    values = _values(info, extra, listed.names, table.select(chosen), column, -1, files, "success_column")
    for value in values:
        if not isinstance(value, bool | int | float | np.bool_ | np.number):
            raise UserError(
                f"'{column}' holds {value!r}, which is neither true nor false",
                where=f"{info.where}.success_column",
                remedy="name a column of booleans or numbers",
            )
    return np.array([bool(value) for value in values], bool)


def _values(
    info: Info,
    extra: dict[str, list[Any]],
    names: tuple[str, ...],
    table: EpisodeTable,
    column: str,
    row: int,
    files: FileTable,
    key: str,
) -> list[Any]:
    """A value of `column` for each episode of `table`: its metadata's, else that of its first (0) or last (-1) row."""
    if column == "episode_index":
        return table.episode_index.tolist()
    if column in extra:
        return extra[column]
    if column in info.features and info.features[column].get("dtype") not in ("video", "image"):
        return _in_rows(info, table, column, row, files)
    known = sorted({*names, *info.features})
    shown = [n for n in known if not n.startswith(("stats/", "videos/", "data/", "meta/"))]
    raise UserError(
        f"'{column}' is no column of the episodes' metadata or of the data{did_you_mean(column, known)}",
        where=f"{info.where}.{key}",
        remedy=f"name one of: {', '.join(shown)}",
    )


def _in_rows(info: Info, table: EpisodeTable, column: str, row: int, files: FileTable) -> list[Any]:
    def take(rows: pa.Table) -> Any:
        value = one_array(rows.column(column))[0].as_py()
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    found = rows.of_episodes(info.where, files, table, range(len(table)), [column], take, row=row)
    return [value for _, value in found]
