"""The transform from absolute actions to deltas, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.conventions.rotations import to_matrices, width
from opentau_train.data.transforms.base import Record, SampleDraws, Transform
from opentau_train.errors import UserError


@dataclass(frozen=True)
class Orientation:
    """A rotation: nine numbers of a matrix in the actions, from `action` on, and `form` in the state, from `state`."""

    action: int
    state: int
    form: str

    def check(self, path: str) -> None: ...


@dataclass(frozen=True)
class Block:
    """`num` dimensions of the actions, from `action` on, against the state's from `state` on: all against the chunk's
    start, or `stepwise` each step against the one before it.

    `orientation` is the block itself where that is a rotation (`num` is 9 then), and that of the tool where a position
    is taken in the axes of the `tool`.
    """

    action: int
    state: int
    num: int
    stepwise: bool = False
    tool: bool = False
    orientation: Orientation | None = None

    def check(self, path: str) -> None: ...

    @property
    def turns(self) -> Orientation | None:
        """Its orientation, where it is itself the rotation."""
        orientation = self.orientation
        return orientation if orientation is not None and orientation.action == self.action else None

    @property
    def place(self) -> slice:
        return slice(self.action, self.action + self.num)


@dataclass(frozen=True)
class Deltas(Transform):
    """Takes the `blocks` of the actions [..., T, A] from absolute to relative to the state [..., S], with `undo` the
    other way, and leaves all other dimensions. The delta of numbers is a difference, that of rotations a rotation:
    `R = delta @ reference` in the base's axes, `R = reference @ delta` in the tool's.
    """

    blocks: tuple[Block, ...]
    undo: bool = False

    reads: ClassVar = ("state", "actions")
    writes: ClassVar = ("actions",)
    per_chunk = True

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        return self._absolute(record) if self.undo else self._relative(record)

    def inverse(self, record: Record) -> Record:
        return self._relative(record) if self.undo else self._absolute(record)

    def _relative(self, record: Record) -> Record:
        if "actions" not in record:
            return record
        state, actions = _both(record)
        record["actions"] = out = actions.copy()
        for block in self.blocks:
            part = actions[..., block.place]
            if block.turns is not None:
                turned = _matrices(part)
                before = _before(turned, _start(state, block.turns), block.stepwise, axis=-3)
                delta = before.mT @ turned if block.tool else turned @ before.mT
                out[..., block.place] = delta.reshape(part.shape)
                continue
            delta = part - _before(part, state[..., block.state : block.state + block.num], block.stepwise)
            out[..., block.place] = _turned(actions, state, block, delta, back=False) if block.tool else delta
        return record

    def _absolute(self, record: Record) -> Record:
        if "actions" not in record:
            return record
        state, actions = _both(record)
        record["actions"] = out = actions.copy()
        for block in sorted(self.blocks, key=lambda block: block.turns is None):  # a position may need its tool's
            part = actions[..., block.place]
            if block.turns is not None:
                start = _start(state, block.turns)
                out[..., block.place] = _composed(_matrices(part), start, block).reshape(part.shape)
                continue
            delta = _turned(out, state, block, part, back=True) if block.tool else part
            start = state[..., None, block.state : block.state + block.num]
            out[..., block.place] = start + (np.cumsum(delta, axis=-2, dtype=np.float64) if block.stepwise else delta)
        return record


def _both(record: Record) -> tuple[NDArray, NDArray]:
    if "state" not in record:
        raise UserError(
            "actions that were trained as deltas have no meaning without the state that they begin at",
            where="Pipeline.units",
            remedy="pass state=, the batch's state of the same sample",
        )
    return record["state"], record["actions"]


def _matrices(part: NDArray) -> NDArray:
    return part.reshape(*part.shape[:-1], 3, 3)


def _before(values: NDArray, start: NDArray, stepwise: bool, *, axis: int = -2) -> NDArray:
    """What each step of `values`, whose steps lie along `axis`, is taken against, where `start` is before the first;
    broadcasts to `values`."""
    start = np.expand_dims(start, axis)
    if not stepwise:
        return start
    earlier = values[..., :-1, :] if axis == -2 else values[..., :-1, :, :]
    return np.concatenate([start, earlier], axis=axis)


def _start(state: NDArray, orientation: Orientation) -> NDArray[np.float64]:
    """[..., 3, 3]: the rotation that the state has."""
    return to_matrices(state[..., orientation.state : orientation.state + width(orientation.form)], orientation.form)


def _composed(delta: NDArray, start: NDArray, block: Block) -> NDArray:
    """Absolute rotations [..., T, 3, 3] from their deltas and the one that they begin at [..., 3, 3]."""
    start = start[..., None, :, :]
    if not block.stepwise:
        return start @ delta if block.tool else delta @ start
    steps = []
    for k in range(delta.shape[-3]):
        step = delta[..., k : k + 1, :, :]
        start = start @ step if block.tool else step @ start
        steps.append(start)
    return np.concatenate(steps, axis=-3)


def _turned(actions: NDArray, state: NDArray, block: Block, delta: NDArray, *, back: bool) -> NDArray:
    """Deltas of a position [..., T, 3] in the base's axes, taken to the tool's; with `back` the other way. `actions`
    have the tool's absolute orientation."""
    assert block.orientation is not None, "`conventions` gives it to what is in the tool's axes"
    turned = _matrices(actions[..., block.orientation.action : block.orientation.action + 9])
    before = _before(turned, _start(state, block.orientation), block.stepwise, axis=-3)
    return np.squeeze((before if back else before.mT) @ delta[..., None], axis=-1)
