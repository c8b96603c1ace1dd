"""What a robot isn't told: actions that aren't finite, or far from all that the policy was trained on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from opentau_train.deploy.robots import TrainedRange
from opentau_train.errors import Explained, UserError

log = logging.getLogger(__name__)


class UnsafeActions(Explained, RuntimeError):
    """Predicted actions that are refused."""


@dataclass(frozen=True)
class Limits:
    """What becomes of an action that leaves the range of the training's actions by more than `margin` times that range:
    `refuse` raises `UnsafeActions`, `clip` brings it back to there and warns.

    The range is that of what the policy is trained on: of deltas, where `data.convention` asks for them.
    """

    then: Literal["refuse", "clip"] = "refuse"
    margin: float = 0.1

    def __post_init__(self) -> None:
        if self.then not in ("refuse", "clip"):
            raise UserError(f"limits={self.then!r} is no choice", where="limits", remedy="give refuse, clip or None")
        if not 0 <= self.margin < np.inf:
            raise UserError(f"margin={self.margin} is no share of a range", where="limits", remedy="set margin=0.1")

    def held(self, chunks: NDArray[np.float32], trained: TrainedRange) -> NDArray[np.float32]:
        """Normalised chunks [B, T, A] inside the limits. Raises `UnsafeActions`."""
        low, high, offset, scale = trained.of_steps(chunks.shape[1])
        span = self.margin * (high - low)
        # What doesn't vary becomes the training's constant, whatever is predicted.
        least = np.where(scale > 0, (low - span - offset) * scale, -np.inf).astype(np.float32)
        most = np.where(scale > 0, (high + span - offset) * scale, np.inf).astype(np.float32)
        real = chunks[..., : len(trained.names)]
        inside = np.clip(real, least, most)
        excess = np.abs(inside - real)
        if not excess.any():
            return chunks
        row, step, dim = (int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
        value = real[row, step, dim] / scale[step, dim] + offset[step, dim]
        what = (
            f"{np.count_nonzero(excess)} of {real.size} actions leave the training's range by over {self.margin:g} "
            f"of it: {trained.names[dim]} is {value:g} at step {step}, trained on {low[step, dim]:g} to "
            f"{high[step, dim]:g}"
        )
        if self.then == "refuse":
            raise UnsafeActions(what, where="limits", remedy="look at what the robot sees, raise margin, or clip")
        log.warning("%s; brought back to there", what)
        clipped = chunks.copy()
        clipped[..., : len(trained.names)] = inside
        return clipped


def check_finite(actions: NDArray[np.float32]) -> None:
    """Raises `UnsafeActions` where one of the actions isn't a finite number."""
    if not np.isfinite(actions).all():
        num = int((~np.isfinite(actions)).sum())
        raise UnsafeActions(
            f"{num} of {actions.size} predicted actions aren't finite",
            where="the policy",
            remedy="look for inputs and weights that aren't finite; a run that diverged has an earlier checkpoint",
        )
