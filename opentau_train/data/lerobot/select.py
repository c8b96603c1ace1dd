"""Which episodes and windows of a LeRobot dataset are used: episode lists, success, the keep-ranges filter.

What a setting names is looked for among the episodes' metadata (columns of meta/episodes, fields of episodes.jsonl),
else in one row of each episode.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from opentau_train.data.lerobot.episodes import StoredEpisodes
from opentau_train.data.lerobot.info import Info
from opentau_train.data.lerobot.rows import OneRow
from opentau_train.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

COMPUTED = "; or compute a file by episode number: python -m opentau_train.tools.keep_ranges ROOT --out FILE"


@dataclass(frozen=True)
class Listing:
    """The episodes to choose among: `extra` {column: a value an episode} of the per-episode metadata that was asked
    for, `names` all of its columns; `told` [E] f64 how many rows these say that each has (None: they say nothing)."""

    info: Info
    stored: StoredEpisodes
    extra: Mapping[str, Sequence[Any]]
    names: tuple[str, ...]
    told: NDArray[np.float64] | None = None

    def select(self, keep: NDArray[np.int64]) -> Listing:
        """The episodes at the positions `keep`, in that order."""
        if np.array_equal(keep, np.arange(len(self.stored.table))):
            return self
        extra = {name: [values[i] for i in keep] for name, values in self.extra.items()}
        told = None if self.told is None else self.told[keep]
        return replace(self, stored=self.stored.select(keep), extra=extra, told=told)

    def values(self, column: str, row: OneRow, key: str) -> Sequence[Any]:
        """A value of `column` for each episode: its metadata's, else that of its first or last row.

        Raises `UserError` naming the setting `key` where there is no such column.
        """
        if column == "episode_index":
            return self.stored.table.episode_index.tolist()
        if column in self.extra:
            return self.extra[column]
        features = self.info.features
        if column in features and features[column].get("dtype") not in ("video", "image"):
            return self._in_rows(column, row)
        known = sorted({*self.names, *features})
        shown = [n for n in known if not n.startswith(("stats/", "videos/", "data/", "meta/"))]
        raise UserError(
            f"'{column}' is no column of the episodes' metadata or of the data{did_you_mean(column, known)}",
            where=f"{self.info.where}.{key}",
            remedy=f"name one of: {', '.join(shown)}{COMPUTED if key == 'filter_key' else ''}",
        )

    def _in_rows(self, column: str, row: OneRow) -> list[Any]:
        def take(table: pa.Table) -> Any:
            value = one_array(table.column(column))[0].as_py()
            return value[0] if isinstance(value, list) and len(value) == 1 else value

        everywhere = range(len(self.stored.table))
        return [v for _, v in rows.of_episodes(self.info.where, self.stored, everywhere, [column], take, row=row)]


def wanted_columns(settings: SourceSettings, where: str) -> list[str]:
    """The per-episode columns that the settings may ask for."""
    names = [settings.control_mode_column]
    names += [settings.success_column] if settings.success_only else []
    return names + (list(keep_ranges.template_fields(settings.filter_key, where)) if settings.use_filter_dict else [])


def kept_positions(listing: Listing, settings: SourceSettings) -> NDArray[np.int64]:
    """Positions of the episodes that `episodes`, `exclude_episodes` and `success_only` leave. Raises `UserError` for
    unknown episodes or columns, and where nothing is left."""
    where, numbers = listing.info.where, listing.stored.table.episode_index
    for key, wanted in (("episodes", settings.episodes), ("exclude_episodes", settings.exclude_episodes)):
        unknown = set(wanted or ()) - set(numbers[np.isin(numbers, wanted or ())].tolist())
        if unknown:
            raise UserError(
                f"episode {min(unknown)} is not in the dataset",
                where=f"{where}.{key}",
                remedy=f"the dataset has {len(numbers)} episodes, {numbers[0]} to {numbers[-1]}",
            )
    keep = ~np.isin(numbers, settings.exclude_episodes)
    if settings.episodes is not None:
        keep &= np.isin(numbers, settings.episodes)
    if settings.success_only:
        chosen = np.flatnonzero(keep)
        good = _succeeded(listing.select(chosen), settings.success_column)
        log.info("data.sources.%s: success_only keeps %d of %d episodes", source_name(where), good.sum(), len(chosen))
        keep[chosen[~good]] = False
    if not keep.any():
        raise UserError(
            "no episode is left", where=where, remedy=f"change {where}.episodes, .exclude_episodes or .success_only"
        )
    return np.flatnonzero(keep)


def source_name(where: str) -> str:
    """NAME of `data.sources.NAME`."""
    return where.rpartition(".")[2]


def filter_blocks(listing: Listing, settings: SourceSettings) -> NDArray[np.int32]:
    """[N, 3] int32 blocks that the keep-ranges filter leaves of the listed episodes; logs what it did.

    Raises `UserError` (see `keep_ranges.read` and `.check`).
    """
    where, table = listing.info.where, listing.stored.table
    if settings.filter_rule == "whole" and settings.chunk_length is None:
        raise UserError(
            "filter_rule=whole needs to know the chunk",
            where=f"{where}.filter_rule",
            remedy=f"set {where}.chunk_length",
        )
    filter = keep_ranges.read(Path(settings.filter_dict_path or "").expanduser(), where, settings.filter_trim_tail)
    if filter.by_number and keep_ranges.never_a_number(settings.filter_key):
        filter, keyed_by = filter.numbered(), "episode number"
        keys = [str(number) for number in table.episode_index.tolist()]
    else:
        keyed_by = settings.filter_key
        fields = keep_ranges.template_fields(settings.filter_key, where)
        columns = {name: listing.values(name, "first", "filter_key") for name in fields}
        keys = keep_ranges.fill_template(settings.filter_key, columns, len(table))
    rows = chunk_rows(settings.chunk_length or 1, row_step(float(listing.info.get("fps")), settings.fps))
    blocks, report = keep_ranges.apply(filter, keys, table.length, rule=settings.filter_rule, rows=rows)
    keep_ranges.check(filter, keys, report, settings.filter_min_match, where)
    log.info(report.text(source_name(where), filter, keyed_by))
    return blocks


def _succeeded(listing: Listing, column: str) -> NDArray[np.bool_]:
    """[E] whether each of the episodes is a success: its own value of `column`, or its last row's."""
    values = listing.values(column, "last", "success_column")
    for value in values:
        if not isinstance(value, bool | int | float | np.bool_ | np.number) or value != value:  # NaN
            raise UserError(
                f"'{column}' holds {value!r}, which is neither true nor false",
                where=f"{listing.info.where}.success_column",
                remedy="name a column of booleans or numbers",
            )
    return np.array([bool(value) for value in values], bool)
