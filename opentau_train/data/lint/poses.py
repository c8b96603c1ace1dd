"""What the turns of a hand say of its rotations' formats, and of the axes of its deltas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np

from opentau_train.data.conventions.places import Located
from opentau_train.data.lint import rotations, turning
from opentau_train.data.lint.finding import UNKNOWN, Finding
from opentau_train.data.lint.motion import ABSOLUTE, DELTA, turns_of, unwrapped
from opentau_train.data.lint.sample import EpisodeSample
from opentau_train.data.lint.turning import Scores, Turned
from opentau_train.data.lint.vector import Vector, Verdict


def poses(state: Vector, actions: Vector, sample: EpisodeSample, verdicts: Sequence[Verdict]) -> Iterator[Verdict]:
    """Verdicts that say more than those on the same keys among `verdicts`: of each rotation of the state, with the
    position and the rotation of the actions that have the same place among their kind."""
    told = {v.where: v.finding.value for v in verdicts if v.finding.name == "rotation"}
    of_kind = {(v.name, k): [p for p in v.parts if p.part.kind == k] for v in (state, actions) for k in _KINDS}
    every = zip_longest(*of_kind.values())
    for position, rotation, moved, turned in every:
        forms = {} if rotation is None else _forms(state, rotation, told)
        acted = {} if turned is None else _forms(actions, turned, told)
        scores: list[Scores] = []
        for own, part in ((position, moved), (rotation, turned)):
            if own is None or part is None or not forms or _references(actions, part, verdicts) == {ABSOLUTE}:
                continue
            scores.append(_followed(state, own, actions, part, sample, forms))
            yield from _frame(actions, part, scores[-1], verdicts)
        absolute = turned is not None and (turned.part.reference or ABSOLUTE) == ABSOLUTE
        if absolute and forms and acted and set(forms) != set(acted):
            scores = [turning.by_angles(forms, acted)]
            yield from _form(actions, turned, acted, [turning.told(scores[0], 1)], sample.fps)
        elif absolute and acted and _references(actions, turned, verdicts) == {ABSOLUTE}:
            yield from _form(actions, turned, acted, [], sample.fps)
        if rotation is not None and forms:
            yield from _form(state, rotation, forms, [turning.told(s, 0) for s in scores], sample.fps)


_KINDS = ("position", "rotation")


def _forms(vector: Vector, part: Located, told: dict[str, str]) -> Turned:
    """The rotations of a part in each form that it may have; none where it holds no rotations."""
    rows, value = vector.rows(part), told.get(vector.key(part, "rotation"), UNKNOWN)
    whole = len(part.places) == 3 or rotations.is_rotation(np.concatenate(rows))
    return turning.turned(rows, value) if whole and value != rotations.NONE else {}


def _references(actions: Vector, part: Located, verdicts: Sequence[Verdict]) -> set[str]:
    key = actions.key(part, "reference")
    return {v.finding.value for v in verdicts if v.where == key and v.finding.name == "reference"}


def _followed(
    state: Vector, own: Located, actions: Vector, part: Located, sample: EpisodeSample, forms: Turned
) -> Scores:
    """How well the state's part `own` follows the actions' `part`, taken as deltas: in each form and frame, and, of
    angles, as a difference of numbers, which is of no axes."""
    rows, steps = state.rows(own), turning.as_vectors(actions.rows(part))
    if own.part.kind == "position":
        return turning.by_deltas(sample, forms, rows, steps)
    scores = dict(turning.by_deltas(sample, forms, None, steps))
    if len(own.places) == len(part.places) == 3:
        turns = turns_of(rows)
        scores[UNKNOWN, UNKNOWN] = turning.agreement(sample, [unwrapped(r, turns) for r in rows], steps)
    return scores


def _frame(actions: Vector, part: Located, scores: Scores, verdicts: Sequence[Verdict]) -> Iterator[Verdict]:
    """The axes of a delta; and that it is one, where its numbers by themselves don't show it."""
    value, evidence = turning.told(scores, 1)
    if value == UNKNOWN and _references(actions, part, verdicts) != {DELTA} and part.part.reference in (None, ABSOLUTE):
        return  # nothing says that it is a delta at all
    yield actions.hold(part, Finding("frame", actions.dims(part), value, evidence))
    if value != UNKNOWN and UNKNOWN in _references(actions, part, verdicts):
        delta = Finding("reference", actions.dims(part), DELTA, evidence)
        yield actions.hold(part, delta, (part.part.reference == ABSOLUTE) == (delta.value == ABSOLUTE))


def _form(
    vector: Vector, part: Located, forms: Turned, told: Sequence[tuple[str, str]], fps: float
) -> Iterator[Verdict]:
    """The form of rotations that may have several, by what was `told` of it, or by their own course."""
    if len(forms) < 2 or part.part.rotation not in (None, *forms):
        return
    dims = vector.dims(part)
    known = [(value, evidence) for value, evidence in told if value != UNKNOWN]
    finding = Finding("rotation", dims, *known[0]) if known else turning.by_itself(dims, forms, fps)
    if finding.is_known:
        yield vector.hold(part, finding)
