"""AdamW with parameter groups, learning-rate schedules as pure functions of the step, and the moving average."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from opentau_train.config.settings import OptimizerSettings


@dataclass(frozen=True)
class Constant:
    """Linear warmup over `warmup_steps`, then 1. Every schedule maps (step, steps) to a factor of the peak rate;
    step 0 is the first optimizer step and already moves (factor 1 / warmup_steps)."""

    warmup_steps: int = 0

    def __call__(self, step: int, steps: int) -> float:
        return min(1.0, (step + 1) / max(1, self.warmup_steps))


@dataclass(frozen=True)
class Linear:
    """Warmup, then a straight line down to `final_ratio` at the last step."""

    warmup_steps: int = 0
    final_ratio: float = 0.0

    def __call__(self, step: int, steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return 1.0 + (self.final_ratio - 1.0) * _progress(step, steps, self.warmup_steps)


@dataclass(frozen=True)
class Cosine:
    """Warmup, then half a cosine down to `final_ratio` at the last step (Loshchilov & Hutter 2017)."""

    warmup_steps: int = 0
    final_ratio: float = 0.1

    def __call__(self, step: int, steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        cosine = 0.5 * (1.0 + math.cos(math.pi * _progress(step, steps, self.warmup_steps)))
        return self.final_ratio + (1.0 - self.final_ratio) * cosine


def _progress(step: int, steps: int, warmup: int) -> float:
    return min(1.0, (step - warmup) / max(1, steps - 1 - warmup))


def adamw(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over two groups: matrices with weight decay; norms, biases and embeddings (1-D, or named `*embed*`)
    without. Fused where the device has it (CPU and CUDA do)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or "embed" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Ema:
    """Exponential moving average of the parameters, in float32: `average = decay * average + (1 - decay) * now`."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = {n: p.detach().clone().float() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, applies: torch.Tensor | None = None) -> None:
        """Move towards the parameters, unless `applies` [] bool is False, which is found out on the device."""
        for name, parameter in model.named_parameters():
            average = self.average[name]
            moved = average.lerp(parameter.float(), 1.0 - self.decay)
            average.copy_(moved if applies is None else torch.where(applies, moved, average))

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """The model with the averages as its parameters; its own come back bit for bit."""
        own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self._write(model, self.average)
        try:
            yield
        finally:
            self._write(model, own)

    @staticmethod
    @torch.no_grad()
    def _write(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.average

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(state[name])
