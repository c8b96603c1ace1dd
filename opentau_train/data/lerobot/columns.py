"""Which columns of a LeRobot dataset are its cameras, state, actions and prompts: read from info.json's features."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.lerobot.info import RESTORE
from opentau_train.data.names import fits, unbracketed
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
WIDEST = 2**16
"""Values of a row of state or actions."""
_TAKEN_BY_DEFAULT = ("observation.state.", "action.")


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
    pictures = [c for c in _of_kind(features, CAMERA) if not is_depth(features[c])]
    columns = pictures if setting is None else list(dict.fromkeys(setting))
    for column in columns:
        _require(features, column, CAMERA, "camera", where)
        if column not in pictures:
            remedy = f"leave it out: {where}=[{','.join(pictures)}]"
            raise UserError(f"'{column}' holds depth, not colours in 8 bits", where=where, remedy=remedy)
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
    return tuple(slices[n] if n in slices else _whole(n, features[n], where) for n in names)


def _whole(name: str, feature: Mapping[str, Any], where: str) -> Column:
    dim = num_values(feature)
    if dim > WIDEST:
        raise UserError(
            f"meta/info.json gives '{name}' {dim} values a row, more than {WIDEST}",
            where=where,
            remedy=f"correct its shape, or {RESTORE}",
        )
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


def choose_dimensions(
    features: Features, columns: tuple[Column, ...], dropped: tuple[str, ...]
) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
    """(names of the dimensions that aren't `dropped`, which these are of the columns' [D])."""
    names = dimension_names(features, columns)
    kept = _kept(names, dropped)
    return tuple(name for name, is_kept in zip(names, kept, strict=True) if is_kept), kept


def check_dropped(dropped: tuple[str, ...], names: tuple[str, ...], where: str) -> None:
    """Raises `UserError` for a pattern that fits no dimension."""
    for pattern in dropped:
        if _kept(names, (pattern,)).all():
            raise UserError(
                f"no dimension is named '{pattern}'{did_you_mean(pattern, names)}",
                where=where,
                remedy=f"name some of {', '.join(map(unbracketed, names))}",
            )


def _kept(names: tuple[str, ...], dropped: tuple[str, ...]) -> NDArray[np.bool_]:
    """[D] the dimensions of these names that no pattern of `dropped` fits: `*` stands for any characters, and
    `column.3` for `column[3]`, whose brackets a command line would have to quote."""
    return np.array([not any(fits(n, p) or fits(unbracketed(n), p) for p in dropped) for n in names], bool)


def choose_texts(features: Features, setting: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The columns given, checked: of texts, or of integers, which are places in meta/tasks."""
    for name in setting:
        _require(features, name, TEXT, "text or integer", where)
    return setting


def choose_weights(features: Features, setting: str | None, where: str) -> str | None:
    """The column given, checked: of a number a row."""
    if setting is not None:
        _require(features, setting, NUMBER, "number", where)
        if (dim := num_values(features[setting])) != 1:
            raise UserError(f"'{setting}' has {dim} values a row, a weight is one", where=where, remedy=f"{where}=null")
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


def is_depth(feature: Mapping[str, Any]) -> bool:
    """Whether info.json says of a camera that its pixels are distances."""
    told = feature.get("info") or feature.get("video_info")
    told = told if isinstance(told, Mapping) else {}
    grey_bits = str(told.get("video.pix_fmt", "")).removeprefix("gray")[:2]
    return bool(told.get("video.is_depth_map") or told.get("is_depth_map")) or grey_bits in ("10", "12", "14", "16")


def unusable(features: Features, used: Collection[str]) -> list[str]:
    """A line for each reason why a column of observations or actions isn't `used`, with all columns that it holds for.
    `left_out` has those that `choose_numbers` might have taken."""
    rest = {
        name: feature
        for name, feature in features.items()
        if name.startswith(("observation", "action")) and name not in used
    }
    rest = {n: f for n, f in rest.items() if f.get("dtype") not in FLOAT and not n.startswith(_TAKEN_BY_DEFAULT)}
    shaped = {n for n, f in rest.items() if len(f.get("shape") or ()) > 1 and f.get("dtype") not in CAMERA}
    kinds = {n: str(f.get("dtype")) for n, f in rest.items()}
    reasons = {
        "no camera that can be read (video or image of 8-bit colours)": {
            n for n in rest if n in shaped or kinds[n] == "depth" or (kinds[n] in CAMERA and is_depth(rest[n]))
        },
        "flags and whole numbers, taken only where state or actions name them": {
            n for n in rest if kinds[n] in NUMBER and n not in shaped
        },
        "text, which is no state and no action": {n for n in rest if kinds[n] == "string"},
    }
    return [
        f"not used, {reason}: " + ", ".join(f"{n} ({kinds[n]})" for n in rest if n in names)
        for reason, names in reasons.items()
        if names
    ]


def frame_size(feature: Mapping[str, Any]) -> tuple[int, int]:
    """(H, W) of a camera's `shape`, channels first, last or left out; (0, 0) where it doesn't say."""
    shape: list[int] = list(feature.get("shape") or [])
    if len(shape) not in (2, 3):
        return 0, 0
    if len(shape) == 2:
        return int(shape[0]), int(shape[1])
    height, width = shape[1:] if shape[0] in (1, 3) and shape[2] not in (1, 3) else shape[:2]
    return int(height), int(width)
