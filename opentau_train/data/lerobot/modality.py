"""meta/modality.json, which datasets made for GR00T have: names of the slices of their state and actions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, Literal

from opentau_train import strangers
from opentau_train.data.lerobot.columns import FLOAT, NUMBER, Column, num_values
from opentau_train.data.lerobot.info import Info, unreadable
from opentau_train.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

_COLUMNS = {"state": "observation.state", "action": "action"}
"""{a part of the file: the column that its slices are cut from, where they name none themselves}"""


def named_slices(info: Info, part: Literal["state", "action"], names: tuple[str, ...], where: str) -> dict[str, Column]:
    """{name: slice} of those of `names` that are no columns. The file is read only where there are such; where it isn't
    there, none is known.

    Raises `UserError` for a name that the file doesn't have either, and for a slice that doesn't fit its column.
    """
    wanted = [name for name in names if name not in info.features]
    path = info.root / "meta" / "modality.json"
    if not wanted or not path.exists():
        return {}
    try:
        tree = strangers.read_json(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    entries = tree.get(part) if isinstance(tree, dict) else None
    entries = entries if isinstance(entries, dict) else {}
    slices = {}
    for name in wanted:
        if name not in entries:
            numbers = [n for n, feature in info.features.items() if feature.get("dtype") in NUMBER]
            raise UserError(
                f"'{name}' is neither a column nor a slice of meta/modality.json"
                f"{did_you_mean(name, [*entries, *numbers])}",
                where=where,
                remedy=f"choose from its slices: {', '.join(entries)}, or the number columns: {', '.join(numbers)}",
            )
        slices[name] = column = _slice(info, part, name, entries[name])
        if part == "state" and not column.name.startswith(_COLUMNS[part]):
            log.warning("%s: '%s' is cut from the column '%s', as meta/modality.json says", where, name, column.name)
    return slices


def _slice(info: Info, part: str, name: str, entry: Any) -> Column:
    fields: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    key = fields.get("original_key") or _COLUMNS[part]
    feature = info.features.get(key, {}) if isinstance(key, str) else {}
    width = num_values(feature)
    start, end = (value if isinstance(value, int) else -1 for value in (fields.get("start"), fields.get("end")))
    if feature.get("dtype") not in NUMBER or not 0 <= start < end <= width:
        raise UserError(
            f"meta/modality.json: '{part}.{name}' is no slice of a column of numbers: {json.dumps(entry)[:80]}",
            where=str(info.root / "meta" / "modality.json"),
            remedy=f"give it start and end, from 0 to the {width} values of the column '{key}'",
        )
    return Column(key, end - start, feature["dtype"] in FLOAT, start, width)
