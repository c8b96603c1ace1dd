"""Which columns of a LeRobot dataset are its cameras, state, actions and prompts: read from info.json's features."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opentau_train.errors import UserError, did_you_mean

Features = Mapping[str, Mapping[str, Any]]

FLOAT = frozenset({"float16", "float32", "float64"})
INTEGER = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
NUMBER = FLOAT | INTEGER | {"bool"}
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Columns of numbers that LeRobot gives every dataset."""
CAMERA = frozenset({"video", "image"})
TEXT = INTEGER | {"string"}
"""Of a prompt: its text, or the number of one in meta/tasks."""


@dataclass(frozen=True)
class Column:
    """`dim` numbers a row: those of a column, or of its `width` ones those from `first` on. `continuous`: between two
    rows they may be interpolated."""

    name: str
    dim: int
    continuous: bool
    first: int
    width: int

    @property
    def dims(self) -> range:
        """The places of its numbers in the column."""
        return range(self.first, self.first + self.dim)


def choose_cameras(
    features: Features, setting: Mapping[str, str] | tuple[str, ...] | None, where: str
) -> dict[str, str]:
    """{camera name: column}. A camera is named by its column's last part, by the whole where two would collide."""
    if isinstance(setting, Mapping):
        for column in setting.values():
            _require(features, column, CAMERA, "camera", where)
        return dict(setting)
    columns = _of_kind(features, CAMERA) if setting is None else list(dict.fromkeys(setting))
    for column in columns:
        _require(features, column, CAMERA, "camera", where)
    times = Counter(c.rpartition(".")[2] for c in columns)
    return {c if times[c.rpartition(".")[2]] > 1 else c.rpartition(".")[2]: c for c in columns}


def choose_numbers(
    features: Features, setting: tuple[str, ...] | None, whole: str, where: str, slices: Mapping[str, Column]
) -> tuple[Column, ...]:
    """The columns and `slices` given, else the column `whole`, else every float column `whole.*`, as info.json orders
    them."""
    if setting is not None:
        for name in setting:
            if name not in slices:
                _require(features, name, NUMBER, "number", where)
        names = list(setting)
    elif features.get(whole, {}).get("dtype") in NUMBER:
        names = [whole]
    else:
        names = [c for c in _of_kind(features, FLOAT) if c.startswith(whole + ".")]
    return tuple(slices[n] if n in slices else _whole(n, features[n]) for n in names)


def _whole(name: str, feature: Mapping[str, Any]) -> Column:
    dim = num_values(feature)
    return Column(name, dim, feature["dtype"] in FLOAT, 0, dim)


def named_so(features: Features, whole: str, key: str) -> str:
    """How to choose columns of numbers where there is none called `whole`: the likely one, and all that there are."""
    names = [name for name in _of_kind(features, NUMBER) if name not in BOOKKEEPING]
    near = difflib.get_close_matches(whole.rpartition(".")[2], names, n=1) or ["COLUMN,..."]
    return f"{key}=[{near[0]}] takes others; the dataset's number columns: {', '.join(names) or '(none)'}"


def left_out(features: Features, whole: str) -> list[str]:
    """The columns `whole.*` of integers and booleans, which `choose_numbers` takes only where they are named."""
    if features.get(whole, {}).get("dtype") in NUMBER:
        return []
    return [c for c in _of_kind(features, NUMBER - FLOAT) if c.startswith(whole + ".")]


def choose_texts(features: Features, setting: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The columns given, checked: of texts, or of integers, which are places in meta/tasks."""
    for name in setting:
        _require(features, name, TEXT, "text or integer", where)
    return setting


def dimension_names(features: Features, columns: tuple[Column, ...]) -> tuple[str, ...]:
    """One name a dimension: `column.name` where info.json names all of a column's dimensions, else `column[i]`."""
    out: list[str] = []
    for column in columns:
        names = _flat_names(features[column.name].get("names"))
        if len(names) == column.width:
            out += [f"{column.name}.{names[i]}" for i in column.dims]
        else:
            out += [f"{column.name}[{i}]" for i in column.dims]
    return tuple(out)


def _flat_names(names: Any) -> list[str]:
    """info.json has lists, {"motors": [...]}, or {name: place}."""
    if isinstance(names, Mapping):
        if names and all(isinstance(place, int) for place in names.values()):
            return sorted(names, key=names.__getitem__)
        return [n for part in names.values() for n in _flat_names(part)]
    if isinstance(names, list):
        return [n for part in names for n in (_flat_names(part) if isinstance(part, list | dict) else [str(part)])]
    return []


def num_values(feature: Mapping[str, Any]) -> int:
    """How many values a row of a column has, by its `shape`."""
    dim = 1
    for size in feature.get("shape") or ():
        dim *= int(size)
    return dim


def _of_kind(features: Features, kinds: frozenset[str]) -> list[str]:
    return [name for name, feature in features.items() if feature.get("dtype") in kinds]


def _require(features: Features, name: str, kinds: frozenset[str], kind: str, where: str) -> None:
    if features.get(name, {}).get("dtype") in kinds:
        return
    there = _of_kind(features, kinds)
    what = f"is a {features[name].get('dtype')} column" if name in features else "is not in the dataset"
    raise UserError(
        f"'{name}' {what}{did_you_mean(name, there)}",
        where=where,
        remedy=f"choose from the dataset's {kind} columns: {', '.join(there) or '(it has none)'}",
    )


def frame_size(feature: Mapping[str, Any]) -> tuple[int, int]:
    """(H, W) of a camera's `shape`, channels first, last or left out; (0, 0) where it doesn't say."""
    shape: list[int] = list(feature.get("shape") or [])
    if len(shape) not in (2, 3):
        return 0, 0
    if len(shape) == 2:
        return int(shape[0]), int(shape[1])
    height, width = shape[1:] if shape[0] in (1, 3) and shape[2] not in (1, 3) else shape[:2]
    return int(height), int(width)
