"""Optimizers over groups of parameters, learning-rate schedules as pure functions of the step, the moving average."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from opentau_train.config.settings import OptimizerSettings, ParameterRule
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


_AT_ONCE = 32
"""Parameters whose average is moved by the same kernels: of all at once, a second and third average would be held."""


class Ema:
    """Exponential moving average of the trainable parameters, in float32:
    `average = decay * average + (1 - decay) * now`. Each rank averages its shards."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: p.detach().clone().float() for name, p in _trainable(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, applies: torch.Tensor | None = None) -> None:
        """Move the averages towards the parameters, unless `applies` [] bool is False, which only the device looks
        at."""
        averages, parameters = _locals(self.average), _locals(_trainable(model))
        for part in (slice(i, i + _AT_ONCE) for i in range(0, len(averages), _AT_ONCE)):
            old = averages[part]
            moved = torch._foreach_lerp(old, [p.float() for p in parameters[part]], 1.0 - self.decay)
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


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _locals(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """This rank's shards, in the order of `tensors`, sharing their memory."""
    from torch.distributed.tensor import DTensor  # takes 1.5 s: not where settings are only checked

    values = (tensor.detach() for tensor in tensors.values())
    return [value.to_local() if isinstance(value, DTensor) else value for value in values]
