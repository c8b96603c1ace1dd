"""Settings of the optimizer: its class and options, rules for parameters by name, the rate at another batch size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from opentau_train.config.bounds import Count, NotNegative, Positive
from opentau_train.errors import UserError


@dataclass(frozen=True)
class ParameterRule:
    """What the parameters that `pattern` fits have of their own; what it doesn't say stays as it was."""

    pattern: str
    """A shell's pattern over the parameter's whole name: `*_out.*`, `layers.3.*`."""
    lr_scale: NotNegative | None = None
    """Their learning rate is this times the schedule's."""
    weight_decay: NotNegative | None = None
    """Theirs, in place of the optimizer's."""
    options: dict[str, Any] = field(default_factory=dict, metadata={"rest": True})
    """Other options that the optimizer keeps by group."""

    def check(self, path: str) -> None: ...


@dataclass(frozen=True)
class OptimizerSettings:
    """`target` is called with the groups of parameters, `lr`, `weight_decay` and `options`, and checked as a model's
    class is."""

    lr: Positive
    """The peak of the learning rate."""
    target: str = field(default="opentau_train.optim.adamw", metadata={"key": "_target_"})
    weight_decay: NotNegative = 1e-4
    """Decoupled, as AdamW's: not on vectors (norms, biases)."""
    no_decay: tuple[str, ...] = ("*embed*",)
    """Patterns of names that weight decay leaves out, besides all vectors (norms, biases); they may fit nothing."""
    groups: dict[str, ParameterRule] = field(default_factory=dict)
    """Rules by a name of their own, in order: where two fit a parameter, the later one's word counts."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """What another global batch than `reference_batch` makes of `lr`: nothing, or it is multiplied by the quotient or
    its root (Goyal et al. 2017 for SGD; Malladi et al. 2022 for Adam)."""
    reference_batch: Count | None = None
    """The global batch that `lr` is for."""
    options: dict[str, Any] = field(default_factory=dict, metadata={"rest": True})

    def rate(self, global_batch: int) -> float:
        """The peak learning rate for batches of `global_batch` samples."""
        power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[self.lr_scaling]
        return self.lr * (global_batch / (self.reference_batch or global_batch)) ** power

    @property
    def arguments(self) -> dict[str, Any]:
        """What the optimizer's class is built from, as the tree that `typed.instantiate` takes."""
        return {"_target_": self.target, "lr": self.lr, "weight_decay": self.weight_decay, **self.options}

    def check(self, path: str) -> None:
        if self.lr_scaling != "none" and self.reference_batch is None:
            raise UserError(
                f"{path}.lr_scaling={self.lr_scaling} needs the global batch that {path}.lr is for",
                remedy=f"set {path}.reference_batch=N",
            )
