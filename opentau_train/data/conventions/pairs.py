"""What a source's parts are to become: each beside the part that a training wants in its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from opentau_train.data.convention import ANGLES, UNITS, WIDTHS, Part, Unit, named
from opentau_train.data.conventions.places import Located, fitting
from opentau_train.errors import UserError

_SIZES = {"rad": 1.0, "deg": math.pi / 180, "m": 1.0, "mm": 0.001, "none": 1.0}
_QUANTITIES = {"rad": "an angle", "deg": "an angle", "m": "a length", "mm": "a length", "none": "a number"}


@dataclass(frozen=True)
class Pair:
    """A part as it is (`before`) and as it becomes (`after`), with the `places` of its dimensions in the dataset and
    their `names`; once all are selected they begin at `first`. `where` is its place in the configuration."""

    before: Part
    after: Part
    places: tuple[int, ...]
    names: tuple[str, ...]
    first: int
    where: str

    @property
    def is_delta(self) -> bool:
        return self.before.reference not in (None, "absolute")

    @property
    def moves(self) -> bool:
        """Whether its reference changes, or the axes of its delta."""
        return self.before.reference != self.after.reference or (
            self.is_delta and self.before.frame != self.after.frame and self.after.frame is not None
        )

    @property
    def reforms(self) -> bool:
        """Whether its rotation gets another format."""
        return self.before.rotation != self.after.rotation

    @property
    def scale(self) -> float:
        """What its unit is multiplied by."""
        if self.before.unit is None or self.after.unit is None:
            return 1.0
        return _SIZES[self.before.unit] / _SIZES[self.after.unit]

    def form(self, part: Part) -> str:
        """The form (`rotations`) of `part`, one of this pair's. Raises `UserError` where the source doesn't say it."""
        missing = "rotation" if part.rotation is None else "unit"
        if part.rotation is None or (part.rotation in ANGLES and part.unit is None):
            raise undeclared(self.where, missing)
        return part.rotation + (":deg" if part.unit == "deg" else "")


def undeclared(where: str, key: str) -> UserError:
    """The error of a conversion that needs what the source doesn't say."""
    return UserError(
        f"data.convention asks for a conversion that needs {where}.{key}, and the source doesn't say it",
        where=f"{where}.{key}",
        remedy=f"set {where}.{key} to what the dataset has",
    )


def pair_up(
    located: Sequence[Located], wanted: Sequence[Part] | None, names: Sequence[str], source: str, vector: str
) -> tuple[Pair, ...]:
    """The `wanted` parts that the source has, in their order; None: its own, as they are. Raises `UserError`."""
    parts = {of.part.name: (i, of) for i, of in enumerate(located)}
    asked = [Part(of.part.kind, name=of.part.name) for of in located] if wanted is None else named(wanted)
    pairs: list[Pair] = []
    first = 0
    for number, want in enumerate(asked):
        if want.name not in parts:
            continue
        i, of = parts[want.name]
        where, path = f"data.sources.{source}.convention.{vector}[{i}]", f"data.convention.{vector}[{number}]"
        places = _chosen(of, want, names, path)
        after = _wanted(of.part, want, where, path)
        width = WIDTHS[after.rotation] if after.rotation is not None else len(places)
        if isinstance(want.dims, int) and want.dims != width:
            raise UserError(
                f"{path} has {want.dims} dimensions, and '{want.name}' of source '{source}' has {width}",
                where=f"{path}.dims",
                remedy=f"set {path}.dims={width}, or leave it out: shorter vectors are padded as a whole",
            )
        before = replace(of.part, dims=len(places))
        pairs.append(Pair(before, replace(after, dims=width), places, tuple(names[p] for p in places), first, where))
        first += len(places)
    if not pairs:
        raise UserError(
            f"source '{source}' has no part of data.convention.{vector}: {', '.join(str(p.name) for p in asked)}",
            where=f"data.sources.{source}.convention.{vector}",
            remedy=f"it has {', '.join(map(str, parts))}: set the name of a part, here or there",
        )
    return tuple(pairs)


def _chosen(of: Located, want: Part, names: Sequence[str], path: str) -> tuple[int, ...]:
    """The places of the part's dimensions that are wanted, in the wanted order. Raises `UserError`."""
    if not isinstance(want.dims, tuple):
        return of.places
    if of.part.kind in ("position", "rotation"):
        raise UserError(
            f"{path}.dims chooses among the dimensions of a {of.part.kind}, which is whole",
            where=f"{path}.dims",
            remedy=f"leave {path}.dims out",
        )
    from_part = [names[place] for place in of.places]
    return tuple(of.places[i] for pattern in want.dims for i in fitting(pattern, from_part, f"{path}.dims"))


def _wanted(before: Part, want: Part, where: str, path: str) -> Part:
    """The part `before` with what is wanted of it. Raises `UserError` for what can't be made of it."""
    if want.kind != before.kind:
        raise UserError(
            f"'{want.name}' is a {before.kind} in {where} and a {want.kind} in {path}",
            where=path,
            remedy="give parts of different kinds different names",
        )
    for key in ("rotation", "reference", "polarity", "range"):
        if getattr(want, key) is not None and getattr(before, key) is None:
            raise undeclared(where, key)
    given = {k: v for k in ("rotation", "reference", "polarity", "range") if (v := getattr(want, k)) is not None}
    after = replace(before, **given, unit=_unit(before, want, where, path))
    if before.range is not None and want.range is None and before.unit is not None and after.unit is not None:
        scale = _SIZES[before.unit] / _SIZES[after.unit]
        after = replace(after, range=(before.range[0] * scale, before.range[1] * scale))
    if want.frame is not None and before.reference is None:
        raise undeclared(where, "reference")
    if before.kind not in ("position", "rotation") or before.reference is None:
        return after
    moves = want.frame is not None or after.reference != before.reference
    if before.reference != "absolute" and before.frame is None and moves:
        raise undeclared(where, "frame")
    if after.reference == "absolute":
        return replace(after, frame=None)
    return replace(after, frame=want.frame or before.frame or ("base" if moves else None))


def _unit(before: Part, want: Part, where: str, path: str) -> Unit | None:
    """The unit that the part gets. Raises `UserError` where the source doesn't say its own, or has another quantity."""
    form = want.rotation or before.rotation
    if before.kind == "rotation" and form is not None and form != before.rotation:
        return (want.unit or (before.unit if before.unit in ("rad", "deg") else "rad")) if form in ANGLES else "none"
    if want.unit is None or want.unit == before.unit:
        return before.unit
    if before.unit is None:
        raise undeclared(where, "unit")
    if _QUANTITIES[before.unit] != _QUANTITIES[want.unit]:
        same = [u for u in UNITS[before.kind] if _QUANTITIES[u] == _QUANTITIES[before.unit]]
        raise UserError(
            f"{where} is {_QUANTITIES[before.unit]} in {before.unit}, and {path} asks for {want.unit}",
            where=f"{path}.unit",
            remedy=f"set it to one of {', '.join(same)}",
        )
    return want.unit
