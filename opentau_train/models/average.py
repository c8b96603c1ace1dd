"""The moving average of a policy's weights, which is validated and exported in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from opentau_train.config.settings import TrainerSettings

_AT_ONCE = 32
"""Parameters whose average is moved by the same kernels: of all at once, a second and third average would be held."""


class Ema:
    """Moving average of the trainable parameters, in float32: `average = d * average + (1 - d) * now`. Each rank
    averages its shards.

    With `decay`, d is that number. With `sigma_rel`, d = (1 - 1/n)^(g + 1) at the n-th step, the power function of
    Karras et al. 2024 (arXiv:2312.02696, section 3.1): a step's weight grows with the g-th power of its number, and the
    weights' deviation is the share `sigma_rel` of the steps so far, however many there are.
    """

    def __init__(self, model: nn.Module, decay: float | None = None, sigma_rel: float | None = None):
        assert (decay is None) != (sigma_rel is None), "one of both"
        self.constant = decay
        self.power = None if sigma_rel is None else power_of(sigma_rel)
        self.average = {name: p.detach().clone().float() for name, p in _trainable(model).items()}

    @classmethod
    def of(cls, model: nn.Module, trainer: TrainerSettings) -> Ema | None:
        """The average that the settings ask for."""
        return cls(model, trainer.ema_decay, trainer.ema_sigma_rel) if trainer.has_ema else None

    def decay(self, step: int) -> float:
        """d of the update after the optimizer's step number `step`, counted from 0."""
        if self.power is None:
            assert self.constant is not None, "one of both"
            return self.constant
        return (1.0 - 1.0 / (step + 1)) ** (self.power + 1.0)

    @torch.no_grad()
    def update(self, model: nn.Module, applies: torch.Tensor | None = None, *, step: int) -> None:
        """Move the averages towards the parameters after the optimizer's step number `step`, counted from 0, unless
        `applies` [] bool is False, which only the device looks at."""
        weight = 1.0 - self.decay(step)
        averages, parameters = _locals(self.average), _locals(_trainable(model))
        for part in (slice(i, i + _AT_ONCE) for i in range(0, len(averages), _AT_ONCE)):
            old = averages[part]
            moved = torch._foreach_lerp(old, [p.float() for p in parameters[part]], weight)
            if applies is not None:
                moved = tuple(torch.where(applies, *both) for both in zip(moved, old, strict=True))
            torch._foreach_copy_(old, moved)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """While inside, the model's parameters are the averages; its own come back bit for bit."""
        parameters = _locals(_trainable(model))
        own = [parameter.clone() for parameter in parameters]
        torch._foreach_copy_(parameters, _locals(self.average))
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, own)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.average

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(state[name])


def power_of(sigma_rel: float) -> float:
    """The exponent g for which the weights n^g of an average over steps 1 to N have the deviation `sigma_rel` N: the
    root of (g + 1) / ((g + 2)^2 (g + 3)) = sigma_rel^2."""
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _locals(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """This rank's shards, in the order of `tensors`, sharing their memory."""
    from torch.distributed.tensor import DTensor  # takes 1.5 s: not where settings are only checked

    values = (tensor.detach() for tensor in tensors.values())
    return [value.to_local() if isinstance(value, DTensor) else value for value in values]
