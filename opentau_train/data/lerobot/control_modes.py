"""Which control mode each episode has: one for all, that of a column of meta/episodes, or that of its rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from opentau_train.config.data import SourceSettings
from opentau_train.data.decode.parquet import texts
from opentau_train.data.lerobot import rows
from opentau_train.data.lerobot.episodes import StoredEpisodes
from opentau_train.data.lerobot.select import Listing
from opentau_train.errors import UserError, did_you_mean

DEFAULT_CONTROL_MODE = "default"


def with_control_mode(listing: Listing, settings: SourceSettings) -> Listing:
    """The listing with the control mode of each episode. Raises `UserError` for a column that isn't there."""
    info, stored, column = listing.info, listing.stored, settings.control_mode_column
    same = settings.control_mode or info.tree.get("control_mode")
    if same:
        modes = [str(same)]
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
        modes = [DEFAULT_CONTROL_MODE]
    known = sorted(set(modes))
    place = {mode: number for number, mode in enumerate(known)}
    code = np.broadcast_to(np.array([place[mode] for mode in modes], np.int16), len(stored.table)).copy()
    table = replace(stored.table, control_mode=code, control_modes=tuple(known))
    return replace(listing, stored=replace(stored, table=table))


def _modes_in_rows(stored: StoredEpisodes, column: str, where: str) -> list[str]:
    """Each episode's text in the data column; 'mixed' where it changes inside the episode."""

    def take(rows: pa.Table) -> str:
        code, known = texts(rows, column)
        distinct = {known[c] if c >= 0 else DEFAULT_CONTROL_MODE for c in np.unique(code)}
        return distinct.pop() if len(distinct) == 1 else "mixed"

    everywhere = range(len(stored.table))
    return [mode for _, mode in rows.of_episodes(where, stored, everywhere, [column], take)]
