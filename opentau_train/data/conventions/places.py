"""Where the parts that a source declares lie among its dimensions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from opentau_train.data.convention import WIDTHS, Part, named
from opentau_train.data.names import fits
from opentau_train.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Located:
    """A part, named, and the places of its dimensions in the vector, in the part's order."""

    part: Part
    places: tuple[int, ...]


def locate(parts: Sequence[Part], names: Sequence[str], path: str) -> tuple[Located, ...]:
    """Where a source's parts lie among the dimensions called `names`. Raises `UserError` for a part that names none, or
    too many, and for dimensions that are in no part or in two."""
    made: list[Located] = []
    end = 0
    for i, part in enumerate(named(parts)):
        where = f"{path}[{i}]"
        places = _places(part, names, end, where, alone=len(parts) == 1)
        needed = WIDTHS.get(part.rotation or "", 3) if part.kind in ("position", "rotation") else len(places)
        if len(places) != needed and (part.kind == "position" or part.rotation is not None):
            raise UserError(
                f"{where} is {part.rotation or 'a position'}, which has {needed} dimensions, and names {len(places)}",
                where=f"{where}.dims",
                remedy=f"name {needed} dimensions of: {', '.join(names)}",
            )
        made.append(Located(part, places))
        end = places[-1] + 1
    count = Counter(place for located in made for place in located.places)
    wrong = [name for i, name in enumerate(names) if count[i] != 1]
    if wrong:
        raise UserError(
            f"dimensions are in no part, or in two: {', '.join(wrong)}",
            where=path,
            remedy=f"list each once; kind: other says nothing of its dimensions, {path}=null nothing of any",
        )
    return tuple(made)


def _places(part: Part, names: Sequence[str], start: int, path: str, *, alone: bool) -> tuple[int, ...]:
    """The places of a part's dimensions; those of a count begin at `start`. Raises `UserError`."""
    if isinstance(part.dims, tuple):
        return tuple(place for pattern in part.dims for place in fitting(pattern, names, f"{path}.dims"))
    width = len(names) if part.width is None and alone else part.width
    if width is None or start + width > len(names):
        has = "doesn't say how many dimensions it has" if width is None else f"reaches to dimension {start + width}"
        raise UserError(
            f"{path} {has}, of {len(names)}: {', '.join(names)}",
            where=f"{path}.dims",
            remedy="give their number, or their names, in a list",
        )
    return tuple(range(start, start + width))


def fitting(pattern: str, names: Sequence[str], path: str) -> list[int]:
    """The places that a name, a pattern or a slice `first:end` names. Raises `UserError` where there are none."""
    bounds = re.fullmatch(r"(\d*):(\d*)", pattern)
    if bounds:
        first, end = (int(text) if text else None for text in bounds.groups())
        places = list(range(len(names)))[first:end]
    else:
        places = [i for i, name in enumerate(names) if fits(name, pattern)]
    if not places:
        raise UserError(
            f"no dimension is named '{pattern}'{did_you_mean(pattern, names)}",
            where=path,
            remedy=f"name one of {', '.join(names)}, a pattern such as *[0], or places such as 0:7",
        )
    return places
