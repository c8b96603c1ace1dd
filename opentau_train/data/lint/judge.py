"""Findings of each part of a source's vectors, held against what is declared of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from opentau_train.data.convention import Convention
from opentau_train.data.conventions.places import Located
from opentau_train.data.lint import cameras, episodes, gripper, motion, rotations, units
from opentau_train.data.lint.finding import UNKNOWN, Finding
from opentau_train.data.lint.motion import ABSOLUTE, DELTA, Following
from opentau_train.data.lint.parts import declaration
from opentau_train.data.lint.poses import poses
from opentau_train.data.lint.sample import F64, EpisodeSample
from opentau_train.data.lint.vector import Vector, Verdict, hold, vector_of

LEAST_ROWS = 200
"""Of fewer nothing is said."""


@dataclass(frozen=True)
class Judged:
    """The verdicts on one source; `declare`, what its convention could say where it says nothing; and what sources of
    the same robot are compared by, of each part {`state gripper`}: which end is open, and the rows of quaternions
    with the place of their real part that is declared."""

    verdicts: tuple[Verdict, ...] = ()
    declare: str = ""
    polarities: Mapping[str, Verdict] = field(default_factory=dict)
    quaternions: Mapping[str, tuple[Sequence[F64], Verdict]] = field(default_factory=dict)


def judge(sample: EpisodeSample, convention: Convention, where: str, *, by_time: bool = False) -> Judged:
    """What the sample says of the source `where`, beside its `convention`; `by_time`: its chunks follow the rows'
    times, not their rate. Raises `UserError` where the convention doesn't fit the dimensions."""
    if sample.num_rows < LEAST_ROWS:
        return Judged()
    follow = motion.following(sample)
    state = vector_of("state", convention.state, sample.state_names, sample.state, where)
    actions = vector_of("actions", convention.actions, sample.action_names, sample.actions, where)
    verdicts = [v for part in state.parts for v in _part(state, part, ABSOLUTE)]
    unit_of = {dim: v.finding.value for v in verdicts if v.finding.name == "unit" for dim in v.finding.dims}
    for part in actions.parts:
        pairs = [p for p, (_, a) in enumerate(sample.pairs) if a in part.places]
        references = motion.references(sample, follow, pairs)
        absolute = part.part.reference == ABSOLUTE
        verdicts += [actions.hold(part, f, absolute == (f.value == ABSOLUTE)) for f in references]
        known = {f.value: f.dims for f in references if f.is_known}
        verdicts += _part(actions, part, ABSOLUTE if set(known) == {ABSOLUTE} else UNKNOWN)
        if DELTA in known and part.part.kind in ("joint", "position"):
            deltas = [p for p in pairs if follow.kind[p] == DELTA]
            of_state = {unit_of.get(sample.state_names[s], UNKNOWN) for s in sample.pairs[deltas, 0]}
            verdicts.append(actions.hold(part, units.of_deltas(known[DELTA], follow.slope[deltas], of_state)))
    better = list(poses(state, actions, sample, verdicts))
    keys = {(v.where, v.finding.name) for v in better}
    verdicts = [v for v in verdicts if (v.where, v.finding.name) not in keys] + better
    grippers = [v for part in actions.parts for v in _gripper(state, actions, part, sample, follow)]
    verdicts += [*grippers, *_whole(sample, follow, where, by_time)]
    turned = dict(_quaternions(state, verdicts)) | dict(_quaternions(actions, verdicts))
    for name, one in turned.items():
        if name.startswith("state") and (other := turned.get(name.replace("state", "actions"))):
            verdicts.append(_same_order(one, other))
    undeclared = [v for v in (state, actions) if not v.is_declared and any(p.part.kind != "other" for p in v.parts)]
    text = ",".join(declaration(v.name, v.parts, _facets(v, verdicts)) for v in undeclared)
    polarities = {v.finding.dims[0]: v for v in grippers if v.finding.name == "polarity" and v.finding.is_known}
    return Judged(tuple(verdicts), f"{where}.convention={{{text}}}" if text else "", polarities, turned)


def between(one: Judged, other: Judged) -> Iterator[Verdict]:
    """The verdicts on two sources of the same robot, whose statistics are shared."""
    for name in [name for name in one.quaternions if name in other.quaternions]:
        yield _same_order(one.quaternions[name], other.quaternions[name])
    for dim in [dim for dim in one.polarities if dim in other.polarities]:
        a, b = one.polarities[dim], other.polarities[dim]
        if a.finding.value != b.finding.value and None in (a.declared, b.declared):  # else each is judged by itself
            evidence = f"{a.finding.value} in {a.where}, {b.finding.value} in {b.where}"
            sure = min(a.finding.confidence, b.finding.confidence)
            yield hold(Finding("gripper between sources", (dim,), "inverted", evidence, sure), None, b.where)


def _part(vector: Vector, part: Located, reference: str) -> Iterator[Verdict]:
    """What a part's own numbers say. Absolute ones have a unit that shows."""
    rows, dims, kind = vector.rows(part), vector.dims(part), part.part.kind
    every, quantity = np.concatenate(rows), "length" if kind == "position" or part.part.unit in ("m", "mm") else "angle"
    if reference == ABSOLUTE and (kind in ("joint", "position") or (kind == "rotation" and len(dims) == 3)):
        yield from (vector.hold(part, f) for f in units.units(quantity, dims, every))
    if kind == "rotation":
        finding = rotations.angles(dims, rows) if len(dims) == 3 else rotations.written(dims, rows)
        agrees = (part.part.rotation or "").startswith(finding.value)
        remedy = {
            rotations.NONE: "correct the kind and dims of the parts",
            rotations.EULER: f"set {vector.key(part, 'rotation')}: euler_xyz, or euler_zyx",
        }.get(finding.value)
        yield vector.hold(part, finding, agrees, remedy)
        if len(dims) == 4 and rotations.is_rotation(every):
            yield hold(rotations.signs(dims, rows), None, vector.key(part, "rotation"))
    if kind == "gripper" and len(dims) == 1:
        yield vector.hold(part, *units.fills(dims, every[:, 0], part.part.range))
    else:
        yield hold(motion.clipped(dims, rows), None, vector.key(part, "dims"))


def _gripper(
    state: Vector, actions: Vector, part: Located, sample: EpisodeSample, follow: Following
) -> Iterator[Verdict]:
    """Which end of a gripper is open, in the state and in the actions, and whether the two run the same way."""
    pair = next((p for p, (_, a) in enumerate(sample.pairs) if (a,) == part.places), None)
    if part.part.kind != "gripper" or pair is None or follow.kind[pair] == DELTA:
        return
    own = next((p for p in state.parts if p.places == (sample.pairs[pair, 0],) and p.part.kind == "gripper"), None)
    if own is None or follow.r2[pair] < gripper.LEAST_R2:
        return
    sign = float(np.sign(follow.slope[pair]))
    found = gripper.polarity(state.dims(own), state.rows(own), actions.rows(part), sign, sample.frames(0.3))
    if not found.is_known:
        usual = gripper.usual_polarity(state.dims(own), state.rows(own))
        found = replace(usual, evidence=f"{found.evidence}; {usual.evidence}")
    yield state.hold(own, found)
    told = found.value if sign > 0 else gripper.other_end(found.value)
    yield actions.hold(part, replace(found, dims=actions.dims(part), value=told))
    ends, ways = (own.part.polarity, part.part.polarity), ("as its state", "against its state")
    declared = None if None in ends else ways[ends[0] != ends[1]]
    way = Finding("gripper direction", actions.dims(part), ways[sign < 0], f"r2 {follow.r2[pair]:.2f}")
    where = actions.key(part, "polarity")
    remedy = f"set {where} or {state.key(own, 'polarity')} to the other end: one of both is wrong"
    yield hold(way, declared, where, remedy=remedy)


def _whole(sample: EpisodeSample, follow: Following, where: str, by_time: bool) -> Iterator[Verdict]:
    """What concerns no part."""
    rate, declared = episodes.rate(sample), None if by_time else f"{sample.fps:g}"
    remedy = f"set {where}.fps={rate.value}, which places chunks by the rows' times; or correct fps in meta/info.json"
    yield hold(rate, declared, f"{where}.fps", remedy=remedy)
    yield from (hold(f, None, where) for f in (*motion.lags(sample, follow), motion.idle(sample, follow)))
    copies = episodes.copies(sample)
    leave_out = f"leave episodes out: {where}.exclude_episodes=[%s]"
    yield replace(hold(copies, None, where), remedy=leave_out % ",".join(copies.dims) if copies.dims else "")
    for pair in cameras.swapped(sample.numbers, sample.histograms):
        yield hold(pair, "steady", f"{where}.cameras", remedy=leave_out % ",".join(pair.dims))


def _quaternions(vector: Vector, verdicts: Sequence[Verdict]) -> Iterator[tuple[str, tuple[Sequence[F64], Verdict]]]:
    """(`state rotation`, (rows, verdict on its format)) of each part of absolute quaternions."""
    found = {v.where for v in verdicts if v.finding.value == ABSOLUTE}
    for part in vector.parts:
        absolute = vector.name == "state" or part.part.reference == ABSOLUTE or vector.key(part, "reference") in found
        rows = vector.rows(part)
        if absolute and len(part.places) == 4 and rotations.is_rotation(np.concatenate(rows)):
            where = vector.key(part, "rotation")
            verdict = hold(Finding("rotation", vector.dims(part), "quaternion", ""), part.part.rotation, where, True)
            yield f"{vector.name} {part.part.name}", (rows, verdict)


def _same_order(one: tuple[Sequence[F64], Verdict], other: tuple[Sequence[F64], Verdict]) -> Verdict:
    """Whether two parts of one robot have their real parts at the same end."""
    (rows, a), (other_rows, b) = one, other
    finding = rotations.ends(a.finding.dims + b.finding.dims, rows, other_rows)
    is_declared = None not in (a.declared, b.declared)
    told = rotations.SAME_END if a.declared == b.declared else rotations.OTHER_END
    remedy = f"set {a.where} or {b.where} to the other order: one of both is wrong"
    return hold(finding, told if is_declared else None, b.where, remedy=remedy)


def _facets(vector: Vector, verdicts: Sequence[Verdict]) -> dict[int, dict[str, Any]]:
    """{part's place: {key: value}} of what was found of whole parts, as a convention says it."""
    out: dict[int, dict[str, Any]] = {}
    for i, part in enumerate(vector.parts):
        for v in verdicts:
            value, facet = v.finding.value, v.finding.name
            whole = v.answer == "note" and v.finding.dims == vector.dims(part) and v.where == vector.key(part, facet)
            if whole and not v.finding.is_usual and value not in (rotations.EULER, rotations.NONE):
                out.setdefault(i, {})[facet] = value
    return out
