"""Real-time chunking: a chunk that is computed while the robot moves goes on from the one that it replaces.

Black, Galliker and Levine 2025: where the flow is led to at each step is corrected by the gradient of how far its
outcome is from what is left of the last chunk (inpainting by guidance, as Pokle et al. 2023 and Song et al. 2023). What
the robot does until the new chunk is there counts fully, later steps less and less, and those that the last chunk
hasn't aren't led.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opentau_train.data.batch import Batch
from opentau_train.data.conventions.select import Select
from opentau_train.data.transforms.base import Record, SampleDraws
from opentau_train.data.transforms.pipeline import Pipeline
from opentau_train.models.sampling import Velocity

LARGEST_WEIGHT = 5.0
"""Of the correction: beta of the paper. At the first steps it would be infinite."""


@dataclass(frozen=True)
class Tail:
    """What is left of the last chunk: `actions` [1, T, A], normalised for the new one, and how much each step counts,
    `weight` [T] in [0, 1]."""

    actions: Tensor
    weight: Tensor

    def lead(self, velocity: Velocity) -> Velocity:
        """The velocity that ends near the tail."""

        def led(x: Tensor, time: Tensor) -> Tensor:
            with torch.enable_grad():
                start = x.detach().requires_grad_()
                predicted = velocity(start, time)
                outcome = start - time[:, None, None] * predicted
                dims = self.actions.shape[-1]
                missed = torch.zeros_like(outcome)
                missed[..., :dims] = (self.actions - outcome[..., :dims].detach()) * self.weight[:, None]
                (correction,) = torch.autograd.grad(outcome, start, missed)
            return predicted.detach() - _strength(float(time[0])) * correction

        return led


def _strength(time: float) -> float:
    """Of the correction at the share of noise `time`: min(beta, (1 - s) / (s r^2)), r^2 = (1 - s)^2 / (s^2 + (1 - s)^2)
    with the paper's s = 1 - time."""
    share = 1.0 - time
    if share <= 0:
        return LARGEST_WEIGHT
    return min(LARGEST_WEIGHT, (share**2 + time**2) / (share * time))


@dataclass(frozen=True)
class Reach:
    """How far a chunk of `length` T steps is executed, `executed`, when the next one is begun, which is there `delay`
    steps later."""

    length: int
    executed: int
    delay: int

    def weights(self) -> NDArray[np.float32]:
        """[T]: 1 for the steps of the new chunk that the robot does by then, then falling exponentially to 0 where the
        last one ends (equation 5 of the paper)."""
        left, step = self.length - self.executed, np.arange(self.length)
        share = (left - step) / (left - self.delay + 1)
        falling = share * np.expm1(share) / np.expm1(1.0)
        return np.where(step < self.delay, 1.0, np.where(step < left, falling, 0.0)).astype(np.float32)


def tail_of(pipeline: Pipeline, last: tuple[Batch, Tensor], now: Batch, reach: Reach) -> Tail:
    """What is left of the chunk [1, T, A] that was predicted for the batch of `last`, seen from the batch `now`. Both
    are of one observation."""
    (before, chunk), head = last, now.norm_head[0]
    # What selects dimensions can't be done again: those that it leaves out aren't given back.
    steps = list(pipeline.transforms.items())
    first = max((i + 1 for i, (_, transform) in enumerate(steps) if isinstance(transform, Select)), default=0)
    records: list[Record] = []
    for state in (before.state, now.state):
        record: Record = {"actions": chunk[0].float().cpu().numpy(), "state": state[0].cpu().numpy(), "norm_head": head}
        for _, transform in reversed(steps[first:]):
            record = transform.inverse(record)
        records.append(record)
    left = records[0]["actions"][reach.executed : reach.length]
    record = {**records[1], "actions": left, "action_is_pad": np.zeros(len(left), bool)}
    for name, transform in steps[first:]:
        if {"state", "actions"} & set(transform.writes):
            record = transform.evaluate(record, SampleDraws(0, name))
    actions = torch.from_numpy(record["actions"])[None]
    weight = torch.zeros(actions.shape[1])
    weight[: reach.length] = torch.from_numpy(reach.weights())
    return Tail(actions.to(chunk.device), weight.to(chunk.device))
