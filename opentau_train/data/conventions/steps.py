"""From what a source declares to what a training wants: the transforms that take its actions and state there.

They come before all others of the dataset, in this order, without those that have nothing to do:

    convert_select     the parts that are wanted, in the wanted order
    convert_units      units, a gripper's polarity and range
    convert_matrices   rotations of the actions whose reference changes, to matrices
    convert_absolute   the source's deltas undone
    convert_deltas     the wanted ones made
    convert_rotations  rotations to the wanted formats
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from opentau_train.data.convention import Convention, Part, by_dimension, runs
from opentau_train.data.conventions.deltas import Block, Deltas, Orientation
from opentau_train.data.conventions.pairs import Pair, pair_up, undeclared
from opentau_train.data.conventions.places import locate
from opentau_train.data.conventions.rotations import Change, Rotations
from opentau_train.data.conventions.select import Select
from opentau_train.data.transforms.base import Transform
from opentau_train.data.transforms.units import Scale
from opentau_train.errors import UserError

Names = tuple[str, ...]


@dataclass(frozen=True)
class Conversions:
    """Of the `source`: what it has `declared`; `transforms` by name; the names of the dimensions after them, and those
    of the actions as the inverses give them back, in the dataset's order.

    `parts` {"state", "actions"}: the part of each dimension after them; `robot_parts`, of the robot's: its state, and
    the actions that are given back. Both are empty where nothing is declared.
    """

    source: str
    declared: Convention
    transforms: dict[str, Transform]
    state_names: Names
    action_names: Names
    robot_names: Names
    parts: dict[str, tuple[Part, ...]]
    robot_parts: dict[str, tuple[Part, ...]]

    @property
    def convention(self) -> Convention:
        """What actions and state are after the transforms."""
        return Convention(runs(self.parts["actions"]) or None, runs(self.parts["state"]) or None)

    @property
    def robot_convention(self) -> Convention:
        """What they are on the robot, without the parts' names: the dimensions of one may lie apart."""
        nameless = {vector: [replace(part, name=None) for part in parts] for vector, parts in self.robot_parts.items()}
        return Convention(runs(nameless["actions"]) or None, runs(nameless["state"]) or None)


def conversions(
    declared: Convention, wanted: Convention, state_names: Names, action_names: Names, source: str
) -> Conversions:
    """What takes the dimensions of `source` from what it has `declared` to what is `wanted`. Raises `UserError` for a
    declaration that doesn't fit the dimensions, and for what isn't declared and would have to be."""
    state = _pairs("state", declared.state, wanted.state, state_names, source)
    actions = _pairs("actions", declared.actions, wanted.actions, action_names, source)
    own = {"state": _in_dataset(state), "actions": _in_dataset(actions)}
    robot_parts = {vector: tuple(of.values()) for vector, of in own.items()}
    if wanted == Convention():
        return Conversions(source, declared, {}, state_names, action_names, action_names, robot_parts, robot_parts)
    robot_names = tuple(action_names[place] for place in own["actions"]) or action_names
    transforms: dict[str, Transform] = {}
    for name, transform in _steps(state, actions, wanted, (len(state_names), len(action_names)), source):
        transforms[name] = transform
        state_names, action_names = transform.names(state_names, action_names)
    parts = {"state": by_dimension([p.after for p in state]), "actions": by_dimension([p.after for p in actions])}
    return Conversions(source, declared, transforms, state_names, action_names, robot_names, parts, robot_parts)


def _pairs(
    vector: str, declared: Sequence[Part] | None, wanted: Sequence[Part] | None, names: Names, source: str
) -> tuple[Pair, ...]:
    """The parts of the source's `vector`, none where it declares none. Raises `UserError`."""
    where = f"data.sources.{source}.convention.{vector}"
    if declared is None and wanted is not None:
        raise UserError(
            f"data.convention.{vector} is set, and source '{source}' doesn't say what its {vector} is made of",
            where=where,
            remedy=f"list the parts of its dimensions under {where}: {', '.join(names)}",
        )
    for i, part in enumerate(declared or ()):
        if part.reference == "delta_start":
            raise UserError(
                f"{where}[{i}].reference=delta_start: a dataset's row belongs to many chunks, and can't be against the "
                "start of one",
                where=f"{where}[{i}].reference",
                remedy="set it to delta_step where a row goes on from the row before, to absolute otherwise",
            )
    return () if declared is None else pair_up(locate(declared, names, where), wanted, names, source, vector)


def _in_dataset(pairs: Sequence[Pair]) -> dict[int, Part]:
    """{place: the part that is there}, in the dataset's order."""
    return dict(sorted(((place, p.before) for p in pairs for place in p.places), key=lambda item: item[0]))


def _steps(
    state: tuple[Pair, ...], actions: tuple[Pair, ...], wanted: Convention, dims: tuple[int, int], source: str
) -> Iterator[tuple[str, Transform]]:
    """The transforms that have something to do, with their names; `dims`: of state and actions in the dataset."""
    chosen = [_chosen(pairs, num) for pairs, num in zip((state, actions), dims, strict=True)]
    if any(places is not None for places in chosen):
        yield "convert_select", Select(*chosen)
    turned = _turned(actions)
    factors, offsets = zip(_affine(state, ()), _affine(actions, turned), strict=True)
    if any((*factors, *offsets)):
        names = [tuple(name for p in pairs for name in p.names) for pairs in (state, actions)]
        yield "convert_units", Scale(factors[0], factors[1], names[0], names[1], offsets[0], offsets[1])
    if turned:
        changes = tuple(Change(p.first, p.form(p.before), "matrix", p.names[0]) for p in turned)
        yield "convert_matrices", Rotations(actions=changes)
    moved = [p for p in actions if p.moves or p in turned]
    layout = Layout(state, actions, turned, source)
    undone = layout.blocks([p for p in moved if p.is_delta], before=True)
    if undone:
        yield "convert_absolute", Deltas(undone, undo=True)
    made = layout.blocks([p for p in moved if p.after.reference not in (None, "absolute")], before=False)
    if made:
        yield "convert_deltas", Deltas(made)
    last = [_changes(state, (), {}, wanted.state), _changes(actions, turned, layout.first, wanted.actions)]
    if any(last):
        yield "convert_rotations", Rotations(*last)


def _chosen(pairs: Sequence[Pair], num: int) -> tuple[int, ...] | None:
    places = tuple(place for p in pairs for place in p.places)
    return None if not pairs or places == tuple(range(num)) else places


def _turned(actions: Sequence[Pair]) -> tuple[Pair, ...]:
    """The rotations of the actions whose reference changes, or in whose axes a position's does. Raises `UserError` for
    a position in the axes of a tool that has no rotation."""
    rotations = [p for p in actions if p.after.kind == "rotation"]
    positions = [p for p in actions if p.after.kind == "position"]
    turned = {p.first for p in rotations if p.moves}
    for i, p in enumerate(positions):
        if p.moves and "tool" in (p.before.frame, p.after.frame):
            if i >= len(rotations):
                raise UserError(
                    f"{p.where} is to be taken in the tool's axes, and there is no rotation that says how it stands",
                    where="data.convention.actions",
                    remedy="add the rotation part that belongs to the position, or set its frame to base",
                )
            turned.add(rotations[i].first)
    return tuple(p for p in rotations if p.first in turned)


def _affine(pairs: Sequence[Pair], turned: Sequence[Pair]) -> tuple[dict[str, float], dict[str, float]]:
    """({dimension: factor}, {dimension: offset}) of units and grippers; rotations in other forms have none."""
    factors, offsets = dict[str, float](), dict[str, float]()
    for p in pairs:
        if p in turned or (p.before.kind == "rotation" and p.reforms):
            continue
        factor, offset = _gripper(p) if p.before.kind == "gripper" else (p.scale, 0.0)
        if factor != 1.0:
            factors |= dict.fromkeys(p.names, factor)
        if offset and not p.is_delta:
            offsets |= dict.fromkeys(p.names, offset)
    return factors, offsets


def _gripper(p: Pair) -> tuple[float, float]:
    """(factor, offset) from the range and polarity before to those after. Raises `UserError`."""
    flips = p.before.polarity != p.after.polarity
    if p.before.range is None or p.after.range is None:
        if flips:
            raise undeclared(p.where, "range")
        return p.scale, 0.0
    (low, high), (to_low, to_high) = p.before.range, p.after.range
    factor = (to_high - to_low) / (high - low)
    if not flips and p.before.range == p.after.range:
        return 1.0, 0.0
    return (-factor, to_high + low * factor) if flips else (factor, to_low - low * factor)


@dataclass(frozen=True)
class Layout:
    """Where the parts of state and actions lie while deltas are undone and made: the `turned` rotations are matrices,
    the state has its own formats."""

    state: tuple[Pair, ...]
    actions: tuple[Pair, ...]
    turned: tuple[Pair, ...]
    source: str

    @property
    def first(self) -> dict[int, int]:
        """{`Pair.first` of a part of the actions: where its dimensions begin}."""
        made, end = {}, 0
        for p in self.actions:
            made[p.first] = end
            end += 9 if p in self.turned else len(p.places)
        return made

    def blocks(self, pairs: Sequence[Pair], *, before: bool) -> tuple[Block, ...]:
        """What `Deltas` takes of these parts, as they are `before` or after. Raises `UserError`."""
        made: list[Block] = []
        for p in pairs:
            block = self._block(p, p.before if before else p.after)
            last = made[-1] if made else None
            if (
                last is not None
                and block.orientation is None
                and last == replace(block, action=block.action - last.num, state=block.state - last.num, num=last.num)
            ):
                made[-1] = replace(last, num=last.num + block.num)  # one subtraction for both
            else:
                made.append(block)
        return tuple(made)

    def _block(self, p: Pair, part: Part) -> Block:
        beside, first = self._beside(p), self.first[p.first]
        stepwise, tool = part.reference == "delta_step", part.frame == "tool"
        if part.kind == "rotation":
            return Block(first, beside.first, 9, stepwise, tool, Orientation(first, beside.first, _early(beside)))
        for key in ("unit", "polarity", "range"):
            one, other = getattr(p.after, key), getattr(beside.after, key)
            if one != other:
                raise UserError(
                    f"the delta of '{p.after.name}' is between actions and state of another {key}: {one} and {other}",
                    where=p.where,
                    remedy=f"declare the {key} of both, and ask for one in data.convention.actions and .state",
                )
        block = Block(first, beside.first, len(p.places), stepwise, tool)
        if not tool:
            return block
        positions = [q for q in self.actions if q.after.kind == "position"]
        turn = [q for q in self.actions if q.after.kind == "rotation"][positions.index(p)]
        turn_beside = self._beside(turn)
        orientation = Orientation(self.first[turn.first], turn_beside.first, _early(turn_beside))
        return replace(block, orientation=orientation)

    def _beside(self, p: Pair) -> Pair:
        """The state's part of the same name. Raises `UserError` where there is none of the same dimensions."""
        beside = next((q for q in self.state if q.after.name == p.after.name), None)
        if beside is None or beside.after.kind != p.after.kind:
            raise UserError(
                f"the delta of '{p.after.name}' is against the state, which has no such part",
                where=f"data.sources.{self.source}.convention.state",
                remedy=f"name the state's part '{p.after.name}' there, and in data.convention.state where that is set",
            )
        if p.after.kind != "rotation" and len(beside.places) != len(p.places):
            raise UserError(
                f"'{p.after.name}' has {len(p.places)} dimensions in the actions and {len(beside.places)} in the state",
                where=p.where,
                remedy="name as many, in the same order, in both",
            )
        return beside


def _early(p: Pair) -> str:
    """The form of a rotation before formats change: with the unit that it has by then."""
    return p.form(p.before if p.reforms else replace(p.before, unit=p.after.unit))


def _changes(
    pairs: Sequence[Pair], turned: Sequence[Pair], first: dict[int, int], wanted: Sequence[Part] | None
) -> tuple[Change, ...]:
    """The rotations that get their format last. A quaternion that is wanted gets its sign, if nothing else."""
    made = []
    for p in pairs:
        quaternion = wanted is not None and (p.after.rotation or "").startswith("quat")
        if p.after.kind == "rotation" and (p in turned or p.reforms or quaternion):
            before = "matrix" if p in turned else _early(p)
            made.append(Change(first.get(p.first, p.first), before, p.form(p.after), p.after.name or ""))
    return tuple(made)
