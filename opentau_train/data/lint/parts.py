"""What the dimensions are where a source declares nothing: a guess by their names and by what rows show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from opentau_train.data.convention import Kind, Part, named
from opentau_train.data.conventions.places import Located
from opentau_train.data.lint.rotations import formats
from opentau_train.data.lint.sample import F64, column_of

_WORDS: tuple[tuple[Kind, str], ...] = (
    ("gripper", r"gripper|grip|finger|jaw"),
    ("joint", r"joints?|shoulder|elbow|wrist|waist"),
    ("position", r"[xyz]|pos|position"),
    ("rotation", r"roll|pitch|yaw|r[xyz]|rotation|orientation|quat|quaternion|euler"),
)
"""Words of a dimension's name, the first kind that has one: a column called `joint_position` has joints."""

_WIDTHS: dict[Kind, tuple[int, ...]] = {"position": (3,), "rotation": (3, 4, 6, 9)}


def guess(names: Sequence[str], rows: F64) -> tuple[Located, ...]:
    """The parts that the dimensions `names` of the rows [N, D] seem to be, runs of neighbours; `other` where neither
    name nor rows tell."""
    kinds: list[Kind] = [_kind(name) for name in names]
    turned = {s: n for s, n, _ in formats(rows) if column_of(names[s]) == column_of(names[s + n - 1])}
    parts, places, start = list[Part](), list[range](), 0
    while start < len(names):
        kind, end = kinds[start], start + 1
        same = kind, column_of(names[start])
        while end < len(names) and end not in turned and (kinds[end], column_of(names[end])) == same:
            end += 1
        if start in turned:
            kind, end = "rotation", start + turned[start]
        fits = end - start in _WIDTHS.get(kind, (end - start,))
        parts.append(Part(kind if fits else "other", dims=end - start))
        places.append(range(start, end))
        start = end
    return tuple(Located(part, tuple(p)) for part, p in zip(named(parts), places, strict=True))


def _kind(name: str) -> Kind:
    """By the dimension's own name, or else by its column's."""
    whole = re.sub(r"^(observation\.state|action)\.?|\[\d+\]$|\.pos$", "", name.lower())
    for text in (whole.rpartition(".")[2], whole):
        for kind, words in _WORDS:
            if re.search(rf"(?<![a-z])(?:{words})(?![a-z])", text):
                return kind
    return "other"


def declaration(vector: str, parts: Sequence[Located], facets: Mapping[int, Mapping[str, Any]]) -> str:
    """The parts as a configuration has them, with what was found of each: {part's place: {key: value}}."""
    shown = []
    for i, located in enumerate(parts):
        keys = {"kind": located.part.kind, "dims": len(located.places), **facets.get(i, {})}
        shown.append("{" + ",".join(f"{k}:{_yaml(v)}" for k, v in keys.items()) + "}")
    return f"{vector}:[{','.join(shown)}]"


def _yaml(value: Any) -> str:
    return f"[{','.join(f'{v:g}' for v in value)}]" if isinstance(value, tuple) else str(value)
