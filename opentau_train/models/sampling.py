"""Chunks that are made from noise in steps, behind a context that is computed once.

Whoever runs a robot chooses how many steps there are, measures how long each part takes, and may lead them somewhere.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opentau_train.data.batch import Batch
from opentau_train.models.draws import Draws
from opentau_train.models.policy import Policy

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(chunk [B, T, D] between noise and actions, its share of noise [B]) -> predicted noise minus actions [B, T, D]."""


class SteppedPolicy(Policy):
    """A policy that samples a chunk in steps."""

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """How many, where nobody says otherwise."""

    @abstractmethod
    def context(self, batch: Batch) -> Any:
        """What all steps look at: computed once for a chunk."""

    @abstractmethod
    def denoise(self, batch: Batch, context: Any, draws: Draws, steps: int) -> Tensor:
        """The chunk [B, T, A] f32, normalised, in `steps` steps. Padded dims are 0. A robot doesn't know where its
        episode ends, so that `batch.action_is_pad` isn't looked at. Raises `UserError` for more than it can take."""

    @torch.no_grad()
    def sample_actions(self, batch: Batch, draws: Draws, steps: int | None = None) -> Tensor:
        return self.denoise(batch, self.context(batch), draws, self.num_steps if steps is None else steps)


class FlowSampler(SteppedPolicy):
    """Flow matching: from t = 1, noise, to 0, actions, in Euler steps along a predicted velocity."""

    num_flow_steps: int

    @property
    def num_steps(self) -> int:
        return self.num_flow_steps

    @abstractmethod
    def noise(self, batch: Batch, draws: Draws) -> Tensor:
        """[B, T, D] f32: where the integration begins; D may be more than the data's dims."""

    @abstractmethod
    def velocity(self, batch: Batch, context: Any, x: Tensor, time: Tensor) -> Tensor:
        """See `Velocity`."""

    def actions(self, batch: Batch, x: Tensor) -> Tensor:
        """[B, T, A] of where the integration ends, 0 in padded dims."""
        return x

    def denoise(
        self, batch: Batch, context: Any, draws: Draws, steps: int, lead: Callable[[Velocity], Velocity] | None = None
    ) -> Tensor:
        """`lead` changes the velocity on the way (`deploy.realtime`)."""

        def predicted(x: Tensor, time: Tensor) -> Tensor:
            return self.velocity(batch, context, x, time)

        velocity = predicted if lead is None else lead(predicted)
        x = self.noise(batch, draws)
        for step in range(steps):
            x = x - velocity(x, torch.full_like(x[:, 0, 0], 1.0 - step / steps)) / steps
        return self.actions(batch, x)
