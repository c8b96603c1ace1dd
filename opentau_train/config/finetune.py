"""Which parameters train: all, those of some names, or LoRA adapters beside a frozen policy (`models.finetune`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec

from opentau_train.config.bounds import Count, Fraction, Positive
from opentau_train.config.resuming import refused, warned
from opentau_train.errors import UserError

EXTRA = 'pip install "opentau_train[vla]"'
OTHERS_TRAIN = refused("the optimizer's moments are of what trained so far")


@dataclass(frozen=True)
class FinetuneSettings:
    """A parameter trains where `trains` fits its name and `frozen` doesn't; with a `rank`, LoRA adapters (Hu et al.
    2021) of the layers that `targets` fits train besides. Patterns are a shell's, over names as the policy has them
    without adapters. What a policy itself keeps from training never trains."""

    trains: tuple[str, ...] = field(default=("*",), metadata=OTHERS_TRAIN)
    frozen: tuple[str, ...] = field(default=(), metadata=OTHERS_TRAIN)
    rank: Count | None = field(default=None, metadata=OTHERS_TRAIN)
    """Of the adapters; null = none."""
    alpha: Positive | None = field(default=None, metadata=refused("the adapters were trained for it"))
    """An adapter's output is multiplied by alpha / rank; null = by 1."""
    dropout: Fraction = field(default=0.0, metadata=warned())
    """Of an adapter's input, in training."""
    targets: tuple[str, ...] | None = field(default=None, metadata=OTHERS_TRAIN)
    """Patterns of names of linear layers that get an adapter; null = the linear layers of the policy's blocks."""

    def check(self, path: str) -> None:
        if self.rank is None:
            given = {"alpha": self.alpha is not None, "dropout": self.dropout > 0, "targets": self.targets is not None}
            name = next((name for name, is_set in given.items() if is_set), None)
            if name is not None:
                raise UserError(
                    f"{path}.{name} is an option of LoRA adapters, and there are none",
                    where=f"{path}.{name}",
                    remedy=f"choose {path}=lora, or leave it out",
                )
        elif find_spec("peft") is None:
            raise UserError("LoRA adapters need the package peft", where=f"{path}.rank", remedy=EXTRA)
        if self.targets == ():
            raise UserError(
                f"{path}.targets is empty", remedy=f"set {path}.targets=null for all layers, or choose {path}=freeze"
            )
        if self.rank is not None and "*" in self.trains and not self.frozen:
            raise UserError(
                f"{path}.rank={self.rank}: adapters are for a policy that keeps its numbers, and all of it trains",
                where=f"{path}.rank and {path}.trains",
                remedy=f"choose {path}=lora, or set {path}.rank=null",
            )


ALL_TRAINS = FinetuneSettings()
