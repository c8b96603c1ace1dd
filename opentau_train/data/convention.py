"""What the numbers of a dataset's actions and state are, as a source declares it and a training wants it.

    data.sources.NAME.convention: what the dataset's columns hold
    data.convention:              what the policy is trained in

Both list parts, which name dimensions in their order. What is left out is unknown in a source, and left as it is in a
training. Nothing here converts: `data/conventions/` does.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, Literal

from opentau_train.errors import UserError

Kind = Literal["joint", "position", "rotation", "gripper", "other"]
Unit = Literal["rad", "deg", "m", "mm", "none"]
Format = Literal["euler_xyz", "euler_zyx", "quat_xyzw", "quat_wxyz", "axis_angle", "rot6d", "matrix"]
Reference = Literal["absolute", "delta_start", "delta_step"]

WIDTHS: dict[str, int] = {
    "euler_xyz": 3,
    "euler_zyx": 3,
    "quat_xyzw": 4,
    "quat_wxyz": 4,
    "axis_angle": 3,
    "rot6d": 6,
    "matrix": 9,
}
"""How many numbers each format of a rotation has."""

ANGLES = ("euler_xyz", "euler_zyx", "axis_angle")
"""The formats that have a unit, rad or deg."""

UNITS = {
    "joint": ("rad", "deg", "m", "mm"),
    "position": ("m", "mm"),
    "rotation": ("rad", "deg", "none"),
    "gripper": ("rad", "deg", "m", "mm", "none"),
    "other": ("rad", "deg", "m", "mm", "none"),
}
"""The units that each kind may have. A gripper's numbers are what its `range` says."""

_MEANING = ("kind", "unit", "rotation", "reference", "frame", "polarity", "range")


@dataclass(frozen=True)
class Part:
    """Some dimensions of one kind. None = unknown in a source, left as it is in a training."""

    kind: Kind
    dims: int | tuple[str, ...] | None = None
    """How many dimensions, from where the part before ends; or which, by name, by pattern (`*`) or by place ("0:7").
    None = as many as the kind has: a position 3, a rotation its format's, a gripper 1, others all that there are."""
    name: str | None = None
    """What the part is called where a training asks for it; None = its kind, the second one `kind_2`."""
    unit: Unit | None = None
    rotation: Format | None = None
    reference: Reference | None = None
    """Absolute; against the state at the chunk's start; or against the step before, the first step against the state.
    The delta of a rotation is a rotation."""
    frame: Literal["base", "tool"] | None = None
    """The axes of a delta of positions or rotations: the base's, or the tool's where the delta begins."""
    polarity: Literal["open", "closed"] | None = None
    """Which end of a gripper has the larger number."""
    range: tuple[float, float] | None = None
    """The smallest and the largest number of a gripper."""

    @property
    def width(self) -> int | None:
        """The number of dimensions as far as the part itself tells it."""
        if isinstance(self.dims, int):
            return self.dims
        by_kind = {"position": 3, "gripper": 1, "rotation": WIDTHS.get(self.rotation or "")}
        return by_kind.get(self.kind) if self.dims is None else None

    def __str__(self) -> str:
        said = (self.name, self.dims, self.rotation, self.unit, self.reference, self.frame, self.polarity)
        return " ".join(str(word) for word in said if word is not None)

    def check(self, path: str) -> None:
        self._check_kind(path)
        if isinstance(self.dims, int) and self.dims < 1:
            raise UserError(f"{path}.dims must be at least 1, got {self.dims}", remedy=f"set {path}.dims to a count")
        if self.dims == ():
            raise UserError(f"{path}.dims names no dimension", remedy=f"name some, or leave {path}.dims out")
        if self.unit is not None and self.unit not in UNITS[self.kind]:
            raise UserError(
                f"{path}.unit={self.unit} is none of a {self.kind}",
                remedy=f"set {path}.unit to one of {', '.join(UNITS[self.kind])}",
            )
        if self.rotation is not None and self.unit is not None and (self.rotation in ANGLES) != (self.unit != "none"):
            right = "rad or deg" if self.rotation in ANGLES else "none"
            raise UserError(f"{path}.unit={self.unit} is none of {self.rotation}", remedy=f"set {path}.unit to {right}")
        if self.frame == "tool" and self.reference == "absolute":
            raise UserError(
                f"{path}.frame=tool is of a delta, and {path}.reference is absolute",
                remedy=f"leave {path}.frame out, or set {path}.reference to delta_start or delta_step",
            )
        if self.range is not None and not self.range[0] < self.range[1]:
            raise UserError(
                f"{path}.range must rise, got {list(self.range)}",
                remedy=f"set {path}.range=[smallest,largest]; {path}.polarity says which end is open",
            )

    def _check_kind(self, path: str) -> None:
        """Raises `UserError` for a key that parts of this kind haven't."""
        of = {
            "rotation": ("rotation",),
            "frame": ("position", "rotation"),
            "polarity": ("gripper",),
            "range": ("gripper",),
        }
        for key, kinds in of.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                raise UserError(
                    f"{path}.{key} is of a {' or '.join(kinds)}, and {path}.kind is {self.kind}",
                    remedy=f"leave {path}.{key} out, or set {path}.kind={kinds[0]}",
                )


@dataclass(frozen=True)
class Convention:
    """The parts of the actions and of the state, each once for every dimension; None = nothing is said of them."""

    actions: tuple[Part, ...] | None = None
    """[{name, dims, unit, reference, ...}, ...], in the order of the dimensions: docs/data.md."""
    state: tuple[Part, ...] | None = None
    """As `actions`."""

    def check(self, path: str) -> None:
        for vector in ("actions", "state"):
            parts = getattr(self, vector)
            if parts is None:
                continue
            where = f"{path}.{vector}"
            if not parts:
                raise UserError(f"{where} has no parts", remedy=f"list some, or leave {where} out")
            twice = [name for name, num in Counter(p.name for p in named(parts)).items() if num > 1]
            if twice:
                raise UserError(f"two parts of {where} are named '{twice[0]}'", remedy=f"give one another {where}.name")
            for i, part in enumerate(parts):
                if vector == "state" and part.reference not in (None, "absolute"):
                    raise UserError(
                        f"{where}[{i}].reference={part.reference} is of actions; a state is absolute",
                        remedy=f"leave {where}[{i}].reference out",
                    )

    @property
    def space(self) -> Literal["joint", "ee", "mixed"] | None:
        """What the actions command: joints, the end effector, or both; None where no part says."""
        kinds = {part.kind for part in self.actions or ()}
        joint, ee = "joint" in kinds, bool(kinds & {"position", "rotation"})
        return ("mixed" if ee else "joint") if joint else ("ee" if ee else None)

    def to_json(self) -> dict[str, Any]:
        """The parts as plain data, without what they leave out."""
        tree: dict[str, Any] = {}
        for vector in ("actions", "state"):
            parts = getattr(self, vector)
            if parts is not None:
                tree[vector] = [{key: v for key, v in asdict(part).items() if v is not None} for part in parts]
        return tree

    def digest(self) -> str:
        """A short hash of the convention: the same for the same parts, whatever they leave out."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def by_dimension(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The part of each dimension, of parts that say how many they have and stand in the order of dimensions."""
    return tuple(part for part in parts for _ in range(part.width or 0))


def runs(parts: Sequence[Part]) -> tuple[Part, ...]:
    """What `by_dimension` gives, as parts again."""
    return tuple(replace(part, dims=len(list(run))) for part, run in groupby(parts))


def named(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts with the names that they go by: `gripper`, `gripper_2`, ... where they have none of their own."""
    seen = Counter[str]()
    made = []
    for part in parts:
        seen[part.kind] += 1
        number = f"_{seen[part.kind]}" if seen[part.kind] > 1 else ""
        made.append(part if part.name is not None else replace(part, name=f"{part.kind}{number}"))
    return tuple(made)


def difference(one: Sequence[Part], other: Sequence[Part]) -> str | None:
    """The first contradiction between the parts of two vectors' dimensions, in words."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):  # what isn't declared has none
        for key in _MEANING:
            values = getattr(a, key), getattr(b, key)
            if None not in values and values[0] != values[1]:
                return f"{key} of dimension {i} is {values[0]} and {values[1]}"
    return None
