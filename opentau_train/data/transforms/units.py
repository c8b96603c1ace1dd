"""The transform that takes a dataset's columns to other units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.names import fits
from opentau_train.data.transforms.base import Record, SampleDraws, Transform
from opentau_train.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Scale(Transform):
    """Multiplies dimensions by factors, such as 0.001 for millimetres to metres: {name pattern: factor} of the `state`
    and of the `actions`, `*` standing for any characters; the first pattern that fits a dimension's name counts. Then
    it adds `state_offsets` and `action_offsets`, given alike.

    `state_names` and `action_names` are the dataset's dimensions, which `for_names` fills in.
    """

    state: dict[str, float] = field(default_factory=dict)
    actions: dict[str, float] = field(default_factory=dict)
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    state_offsets: dict[str, float] = field(default_factory=dict)
    action_offsets: dict[str, float] = field(default_factory=dict)

    reads: ClassVar = ("state", "actions")
    writes: ClassVar = ("state", "actions")
    broadcasts: ClassVar = True

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        for name, (factors, offsets) in self._maps.items():
            if name in record:
                record[name] = record[name] * factors
                if offsets is not None:
                    record[name] += offsets
        return record

    def inverse(self, record: Record) -> Record:
        for name, (factors, offsets) in self._maps.items():
            if name in record:
                record[name] = (record[name] if offsets is None else record[name] - offsets) / factors
        return record

    def for_names(self, state: tuple[str, ...], actions: tuple[str, ...]) -> Scale:
        made = replace(self, state_names=state, action_names=actions)
        assert made._maps  # raises for what doesn't fit the names
        return made

    @cached_property
    def _maps(self) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
        state = _factors(self.state, self.state_names, "state"), _offsets(self.state_offsets, self.state_names, "state")
        names = self.action_names
        return {
            "state": state,
            "actions": (_factors(self.actions, names, "actions"), _offsets(self.action_offsets, names, "actions")),
        }


def _factors(rules: Mapping[str, float], names: tuple[str, ...], what: str) -> NDArray[np.float32]:
    """[D] f32. Raises `UserError` for a factor that can't be undone and a pattern that fits no name."""
    for pattern, factor in rules.items():
        if not np.isfinite(factor) or factor == 0:
            raise UserError(f"a factor of {what} is {factor}", where=pattern, remedy="give a finite number but 0")
    return _of_names(rules, names, what, 1.0)


def _offsets(rules: Mapping[str, float], names: tuple[str, ...], what: str) -> NDArray[np.float32] | None:
    """[D] f32, or None where there are none. Raises `UserError`."""
    for pattern, offset in rules.items():
        if not np.isfinite(offset):
            raise UserError(f"an offset of {what} is {offset}", where=pattern, remedy="give a finite number")
    return _of_names(rules, names, what, 0.0) if rules else None


def _of_names(rules: Mapping[str, float], names: tuple[str, ...], what: str, otherwise: float) -> NDArray[np.float32]:
    """[D] f32: of each name the value of the first pattern that fits it. Raises `UserError` for one that fits none."""
    for pattern in rules:
        if not any(fits(name, pattern) for name in names):
            raise UserError(
                f"no dimension of {what} is named '{pattern}'{did_you_mean(pattern, names)}",
                where="transforms",
                remedy=f"name one of {', '.join(names)}, or a pattern such as *[0]",
            )
    values = [next((v for pattern, v in rules.items() if fits(name, pattern)), otherwise) for name in names]
    return np.array(values, np.float32)
