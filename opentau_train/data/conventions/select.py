"""The transform that takes some dimensions, in another order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from opentau_train.data.transforms.base import Record, SampleDraws, Transform


@dataclass(frozen=True)
class Select(Transform):
    """Takes the dimensions at these places, in this order; None = all as they are.

    The inverse puts them back into the dataset's order. Those that weren't taken are lost: it doesn't invent them.
    """

    state: tuple[int, ...] | None = None
    actions: tuple[int, ...] | None = None

    reads: ClassVar = ("state", "actions")
    writes: ClassVar = ("state", "actions")
    broadcasts: ClassVar = True

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        for name, places in (("state", self.state), ("actions", self.actions)):
            if places is not None and name in record:
                record[name] = record[name][..., places]
        return record

    def inverse(self, record: Record) -> Record:
        for name, places in (("state", self.state), ("actions", self.actions)):
            if places is not None and name in record:
                record[name] = record[name][..., np.argsort(places)]
        return record

    def names(self, state: tuple[str, ...], actions: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        of_state = state if self.state is None else tuple(state[i] for i in self.state)
        return of_state, actions if self.actions is None else tuple(actions[i] for i in self.actions)
