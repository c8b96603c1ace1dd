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
    and of the `actions`, `*` standing for any characters; the first pattern that fits a dimension's name counts.

    `state_names` and `action_names` are the dataset's dimensions, which `for_names` fills in.
    """

    state: dict[str, float] = field(default_factory=dict)
    actions: dict[str, float] = field(default_factory=dict)
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()

    reads: ClassVar = ("state", "actions")
    writes: ClassVar = ("state", "actions")

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        for name, factors in self._factors.items():
            if name in record:
                record[name] = record[name] * factors
        return record

    def inverse(self, record: Record) -> Record:
        for name, factors in self._factors.items():
            if name in record:
                record[name] = record[name] / factors
        return record

    def for_names(self, state: tuple[str, ...], actions: tuple[str, ...]) -> Scale:
        made = replace(self, state_names=state, action_names=actions)
        assert made._factors  # raises for what doesn't fit the names
        return made

    @cached_property
    def _factors(self) -> dict[str, NDArray[np.float32]]:
        return {
            "state": _factors(self.state, self.state_names, "state"),
            "actions": _factors(self.actions, self.action_names, "actions"),
        }


def _factors(rules: Mapping[str, float], names: tuple[str, ...], what: str) -> NDArray[np.float32]:
    """[D] f32. Raises `UserError` for a factor that can't be undone and a pattern that fits no name."""
    for pattern, factor in rules.items():
        if not np.isfinite(factor) or factor == 0:
            raise UserError(f"a factor of {what} is {factor}", where=pattern, remedy="give a finite number but 0")
        if not any(fits(name, pattern) for name in names):
            raise UserError(
                f"no dimension of {what} is named '{pattern}'{did_you_mean(pattern, names)}",
                where="transforms",
                remedy=f"name one of {', '.join(names)}, or a pattern such as *[0]",
            )
    return np.array(
        [next((factor for pattern, factor in rules.items() if fits(name, pattern)), 1.0) for name in names],
        np.float32,
    )
