"""The episodes that a source is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class EpisodeSample:
    """Some episodes of a source, as its files have them: of each its number, `state` [L, S] and `actions` [L, A], and,
    where the rows have times, `seconds` [L]. `fps` is the rate that the source says. `histograms` {camera: [E, K]} of
    the episodes' pictures, empty where none were read; NaN for an episode whose pictures can't be."""

    fps: float
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    numbers: tuple[int, ...]
    state: Sequence[F64]
    actions: Sequence[F64]
    seconds: Sequence[F64] = ()
    histograms: dict[str, F64] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.actions))

    @property
    def pairs(self) -> NDArray[np.int64]:
        """[P, 2] (dimension of the state, dimension of the actions) that are the same quantity: by their names without
        the column's first part, or else by their places, where both have as many."""
        places = {_quantity(name): s for s, name in enumerate(self.state_names)}
        pair = {a: places.get(_quantity(name)) for a, name in enumerate(self.action_names)}
        if len(self.state_names) == len(self.action_names):
            taken = set(pair.values())
            pair = {a: a if s is None and a not in taken else s for a, s in pair.items()}
        return np.array([(s, a) for a, s in pair.items() if s is not None], np.int64).reshape(-1, 2)

    def frames(self, seconds: float) -> int:
        """As many frames, two at least."""
        return max(2, round(seconds * self.fps))


def column_of(name: str) -> str:
    """`observation.state` of `observation.state[3]` and of `observation.state.x`."""
    return name.partition("[")[0] if "[" in name else name.rpartition(".")[0]


def _quantity(name: str) -> str:
    """`joint_position[0]` of `observation.state.joint_positions[0]` and of `action.joint_position[0]`."""
    for prefix in ("observation.state", "action"):
        name = name.removeprefix(prefix).lstrip(".")
    column, bracket, place = name.partition("[")
    return column.removesuffix("s") + bracket + place
