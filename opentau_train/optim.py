"""Optimizers over groups of parameters, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from opentau_train.config.optimizer import OptimizerSettings, ParameterRule
from opentau_train.config.typed import bind
from opentau_train.errors import UserError, did_you_mean, fits_nothing


@dataclass(frozen=True)
class Constant:
    """Linear warmup over `warmup_steps`, then 1. Every schedule maps (step, steps) to a factor of the peak rate;
    step 0 is the first optimizer step and already moves (factor 1 / warmup_steps)."""

    warmup_steps: int = 0

    def __call__(self, step: int, steps: int) -> float:
        return min(1.0, (step + 1) / max(1, self.warmup_steps))


@dataclass(frozen=True)
class Linear:
    """Warmup, then a straight line down to `final_ratio` at the last of `cycle_steps`, by default the run's steps. A
    longer cycle isn't finished; after a shorter one the rate stays."""

    warmup_steps: int = 0
    final_ratio: float = 0.0
    cycle_steps: int | None = None

    def __call__(self, step: int, steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return 1.0 + (self.final_ratio - 1.0) * _progress(step, self.cycle_steps or steps, self.warmup_steps)


@dataclass(frozen=True)
class Cosine:
    """Warmup, then half a cosine down to `final_ratio` at the last of `cycle_steps` (Loshchilov & Hutter 2017), by
    default the run's steps. A longer cycle isn't finished; after a shorter one the rate stays."""

    warmup_steps: int = 0
    final_ratio: float = 0.1
    cycle_steps: int | None = None

    def __call__(self, step: int, steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = _progress(step, self.cycle_steps or steps, self.warmup_steps)
        return self.final_ratio + (1.0 - self.final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class WarmupStableDecay:
    """Warmup, then the peak, then over the last `decay_steps` of the run a straight line down to `final_ratio` (Hu et
    al. 2024, MiniCPM). A run that is to go on longer resumes from a checkpoint before the decay."""

    decay_steps: int
    warmup_steps: int = 0
    final_ratio: float = 0.1

    def __call__(self, step: int, steps: int) -> float:
        left = min(1.0, (steps - 1 - step) / max(1, self.decay_steps))
        return min(1.0, (step + 1) / max(1, self.warmup_steps)) * (self.final_ratio + (1.0 - self.final_ratio) * left)


def _progress(step: int, steps: int, warmup: int) -> float:
    return min(1.0, (step - warmup) / max(1, steps - 1 - warmup))


def schedule_warnings(options: Mapping[str, Any], steps: int) -> list[str]:
    """What of a schedule's `options` doesn't go with a run of `steps`."""
    warmup, cycle, decay = (options.get(name) or 0 for name in ("warmup_steps", "cycle_steps", "decay_steps"))
    lines = []
    if warmup >= steps:
        lines.append(f"scheduler.warmup_steps={warmup}: the run of {steps} steps ends before the rate's peak")
    if 0 < cycle < steps:
        lines.append(f"scheduler.cycle_steps={cycle}: {steps - cycle} of {steps} steps stay at the lowest rate")
    if decay and warmup + decay > steps:
        lines.append(f"scheduler: {warmup} steps of warm-up and {decay} of decay overlap in a run of {steps}")
    return lines


Group = dict[str, Any]
"""A group of parameters as torch's optimizers take them: `params`, and what they have of their own."""


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer that `settings` name, over the model's trainable parameters in groups (`group_parameters`).

    Raises `UserError` for a rule that fits no parameter or has an option that the optimizer doesn't keep by group.
    """
    optimizer = _make(settings, group_parameters(model, settings))
    for name, rule in settings.groups.items():
        for option in rule.options:
            if option not in optimizer.defaults:
                raise UserError(
                    f"{settings.target} has no option '{option}' a group{did_you_mean(option, optimizer.defaults)}",
                    where=f"optimizer.groups.{name}",
                    remedy=f"options of a group: pattern, lr_scale, {', '.join(sorted(optimizer.defaults))}",
                )
    return optimizer


def check_optimizer(settings: OptimizerSettings) -> None:
    """Raises `UserError` for options that the optimizer's class doesn't take, before there is a model: an optimizer is
    built over a parameter made for the check."""
    guarded = torch.optim.Optimizer.add_param_group
    # What torch wraps around it imports the compiler, two seconds that a check of settings needn't take.
    torch.optim.Optimizer.add_param_group = inspect.unwrap(guarded)  # type: ignore[method-assign]
    try:
        _make(settings, [{"params": [nn.Parameter(torch.zeros(1, 1))]}])
    finally:
        torch.optim.Optimizer.add_param_group = guarded  # type: ignore[method-assign]


def _make(settings: OptimizerSettings, groups: Sequence[Group]) -> torch.optim.Optimizer:
    target, values = bind(settings.arguments, "optimizer", ["params"], ["groups", "no_decay"])
    try:
        return target(params=groups, **values)
    except ValueError as error:
        raise UserError(
            f"{settings.target} refuses its options: {error}", where="optimizer", remedy="change the one that it names"
        ) from error


def group_parameters(model: nn.Module, settings: OptimizerSettings) -> list[Group]:
    """The trainable parameters, each in the group of those with the same options, highest weight decay first.

    Matrices have the weight decay of `settings`; vectors (norms, biases) and what `no_decay` fits have none. Then the
    rules of `groups` are applied in order. `lr_scale` stays in the group, for `set_lr`. Raises `UserError` for a rule
    that fits no trainable parameter.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, rule in settings.groups.items():
        if not any(fnmatchcase(parameter, rule.pattern) for parameter in trainable):
            raise fits_nothing("trainable parameter", f"optimizer.groups.{name}.pattern", rule.pattern, trainable)
    groups: list[Group] = []
    for name, parameter in trainable.items():
        plain = parameter.ndim <= 1 or any(fnmatchcase(name, pattern) for pattern in settings.no_decay)
        options: Group = {"lr_scale": 1.0, "weight_decay": 0.0 if plain else settings.weight_decay}
        for rule in settings.groups.values():
            if fnmatchcase(name, rule.pattern):
                options |= _own_options(rule)
        group = next((g for g in groups if {k: v for k, v in g.items() if k != "params"} == options), None)
        if group is None:
            group = {"params": [], **options}
            groups.append(group)
        group["params"].append(parameter)
    for group in groups:
        group["lr"] = settings.lr * group["lr_scale"]
    return sorted(groups, key=lambda group: -group["weight_decay"])


def _own_options(rule: ParameterRule) -> Group:
    stated = {"lr_scale": rule.lr_scale, "weight_decay": rule.weight_decay}
    return {**rule.options, **{key: value for key, value in stated.items() if value is not None}}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set each group's learning rate to `lr` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def adamw(
    params: Sequence[Group],
    lr: float,
    weight_decay: float = 0.0,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    fused: bool = True,
) -> torch.optim.AdamW:
    """Torch's AdamW, fused: one kernel for all parameters, on CPU too."""
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=fused)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of the groups that say `muon: true`, AdamW for all else; both torch's.

    `adjust_lr=match_rms_adamw` gives Muon's update the size of AdamW's (Liu et al. 2025), so that one learning rate and
    weight decay serve both. Sharded matrices work: their products are then summed over ranks, in bfloat16 as Muon
    computes them, and agree with the unsharded ones to its rounding.
    """

    def __init__(
        self,
        params: Sequence[Group],
        lr: float,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr: Literal["original", "match_rms_adamw"] = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool = True,
    ):
        muon, rest = [], []
        for group in params:
            matrices = [p for p in group["params"] if p.ndim == 2 and group.get("muon", False)]
            others = [p for p in group["params"] if all(p is not matrix for matrix in matrices)]
            muon += [{**group, "params": matrices, "muon": True}] if matrices else []
            rest += [{**group, "params": others, "muon": False}] if others else []
        self._parts: dict[bool, torch.optim.Optimizer] = {}
        if muon:
            self._parts[True] = torch.optim.Muon(
                muon, lr, weight_decay, momentum, nesterov, ns_steps=ns_steps, adjust_lr_fn=adjust_lr
            )
        if rest:
            self._parts[False] = adamw(rest, lr, weight_decay, betas=betas, eps=eps, fused=fused)
        # Each part has filled its groups with its own options: the groups, and the moments below, are this optimizer's.
        super().__init__([*muon, *rest], {"lr": lr, "weight_decay": weight_decay, "muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "both parts would call it"
        for is_muon, part in self._parts.items():
            # Anew in each step: loading a state makes new ones.
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["muon"] == is_muon]
            part.step()
