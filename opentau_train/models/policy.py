"""What a policy must offer to be trained: per-sample sums and counts of its loss terms, never a mean.

The loop divides once, by the counts of the whole global batch, so any split into micro-batches and ranks trains the
same. A policy knows nothing of datasets: the validation takes its per-sample terms apart by group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from opentau_train.config.data import DataSettings
from opentau_train.config.typed import bind
from opentau_train.config.weights import WEIGHT_KEYS, weight_settings
from opentau_train.data.batch import Batch
from opentau_train.data.transforms.base import Wants
from opentau_train.errors import UserError
from opentau_train.models.draws import Draws
from opentau_train.models.lerobot import LerobotExport
from opentau_train.models.weight_map import WeightMap
from opentau_train.types import BatchSpec, LossTerms


class Policy(nn.Module, ABC):
    """Built as `Class(spec, width=..., ...)`: what the mixture yields (`BatchSpec`), then typed
    keyword arguments that its YAML in conf/model/ sets (`typed.instantiate(tree, "model", spec=spec)`).

    Every parameter takes part in every forward pass: DDP runs without `find_unused_parameters`.
    """

    spec: BatchSpec
    """What it was built for."""

    loss_weights: dict[str, float]
    """{term: its weight in the total loss}, one entry for each term that `forward` returns."""

    meta_init: ClassVar[bool] = False
    """True: the constructor may run on torch's meta device, and `init_weights` sets what no `reset_parameters` of the
    modules inside sets. The policy is then sharded before it has memory. False: each process builds the whole on its
    CPU and moves it to the device block by block."""

    classes: Mapping[str, int] = {}
    """{term that is a cross-entropy: among how many classes}: what guessing costs is its logarithm."""

    modes: ClassVar[tuple[str, ...]] = ("policy",)
    """The modes of samples that it knows (`config.modes`): what each means to it is in the batch's `mode`."""

    samplers: ClassVar[tuple[str, ...]] = ("sample_actions",)
    """Its methods that use parameters outside of `forward`: where it is sharded, they gather them as `forward` does."""

    encoders: ClassVar[Mapping[str, WeightMap]] = {}
    """{option that names the weights of an encoder inside, or None: how its files name the policy's tensors}."""

    packing: bool = False
    """True: in training no padding is computed. `forward` then gets batches that are `counted`, and its results are
    those of the same batch without the counts, up to rounding (`models.packing`)."""

    padded_tokens: int = 0
    """Tokens that a sample takes where it isn't packed, whatever it has; 0 where `num_tokens` isn't known."""

    adapters: tuple[str, ...] = ()
    """The names of its layers that LoRA adapters wrap (`models.finetune`)."""

    borrowed: tuple[str, ...] = ()
    """The names of frozen parameters that checkpoints leave out, as they are in a file (`checkpoints.base`)."""

    def init_weights(self) -> None:
        """Set the parameters and buffers anew, in place, by draws from torch's global generator (`meta_init`)."""

    def wants(self) -> Wants:
        """What the policy needs of the data: transforms that make its own fields (tokens, masks), a size of pictures.

        `forward` gets tensors only: text is turned into them in the loader's workers, by these transforms.
        """
        return Wants()

    @classmethod
    def check(cls, options: Mapping[str, Any], data: DataSettings) -> None:
        """Raises `UserError` for options that can be told to be wrong before any data are opened, or that don't fit the
        settings of the data."""

    def weight_map(self) -> WeightMap:
        """How published files of the whole policy name its tensors (`model.pretrained_path`)."""
        return WeightMap()

    def vlm_weight_map(self) -> WeightMap | None:
        """The same for files of the vision-language model alone (`model.vlm_path`); None: it has none inside."""
        return None

    def backbone_weight_map(self) -> WeightMap | None:
        """The same for files of the image encoder alone (`model.backbone_path`); None: it takes none."""
        return None

    def lerobot_export(self) -> LerobotExport | None:
        """The policy as LeRobot's class of the same architecture has it; None: there is no such class. Raises
        `UserError` where it has none of this form."""
        return None

    def assets(self) -> dict[str, tuple[str, ...]]:
        """{path in the options: names of text files in it} of what the policy reads beside its weights and is to be
        kept with them; a path may be the file itself."""
        return {}

    @abstractmethod
    def forward(self, batch: Batch, draws: Draws) -> LossTerms:
        """{term: (sum [B] f32, count [B] f32)} over the supervised elements of each sample.

        What is random comes from `draws`. A sample that a term doesn't supervise (its mode, padding, weight 0) has sum
        and count exactly 0 in it and gives it no gradient. A sample's numbers don't depend on the batch that it is in.
        Float32 under autocast.
        """

    @abstractmethod
    def term_counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        """{term: count [B] f32} as `forward` returns them, from the masks alone, on the device where the batch is: the
        training loop asks while it is still in the host's memory, on the thread that reads the data."""

    def num_tokens(self, batch: Batch) -> torch.Tensor:
        """[B, K] int64: how many tokens each sample has, of each of K kinds, from the masks alone: asked where
        `term_counts` is. Samples that are sketched from metadata (`packing.limits`) have no pictures."""
        raise UserError(
            f"{type(self).__name__} doesn't count tokens, so that none can be packed or capped",
            where="model._target_",
            remedy="leave out model.packing and data.max_num_tokens_after_packing, or give the class `num_tokens`",
        )

    def num_cut(self, batch: Batch) -> int:
        """How many samples of the batch have a prompt that was cut to the policy's limit; asked where `term_counts`
        is."""
        return 0

    @abstractmethod
    def sample_actions(self, batch: Batch, draws: Draws) -> torch.Tensor:
        """The predicted chunk `[B, T, A]` f32, normalised.

        Reads only what a robot has (images, prompt, state, masks of dims and cameras), never the batch's actions.
        """

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated layers, in order: the units that are sharded or compiled one by one."""


WEIGHT_MAPS = {"pretrained_path": "weight_map", "vlm_path": "vlm_weight_map", "backbone_path": "backbone_weight_map"}
"""{key of `model`: the method of `Policy` that maps what it names}."""


def bind_model(model: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class that the settings `model` name, and its converted options (`typed.bind`)."""
    return bind(model, "model", ["spec"], WEIGHT_KEYS)


def build_policy(model: Mapping[str, Any], spec: BatchSpec) -> Policy:
    """The policy of the settings `model`, untrained. Raises `UserError`."""
    target, options = bind_model(model)
    policy: Policy = target(spec=spec, **options)
    if not any(policy.loss_weights.values()):
        keys = " or ".join(f"model.{term}_weight" for term in policy.loss_weights)
        raise UserError("all loss terms have weight 0: nothing would train", where="model", remedy=f"set {keys} to 1.0")
    return policy


def check_model(model: Mapping[str, Any], data: DataSettings) -> None:
    """What can be said of the settings `model` before data are opened. Raises `UserError`, also for weights of a part
    that the class hasn't."""
    target, options = bind_model(model)
    check_modes(target, data)
    if isinstance(target, type) and issubclass(target, Policy):
        target.check(options, data)
    for key in weight_settings(model).paths:
        method = WEIGHT_MAPS[key]
        if key != "pretrained_path" and getattr(target, method, None) is getattr(Policy, method):
            raise not_read(key, target)


def check_modes(target: Any, data: DataSettings) -> None:
    """Raises `UserError` for a source with a mode that the class `target` doesn't know."""
    known = target.modes if isinstance(target, type) and issubclass(target, Policy) else Policy.modes
    for name, mode in [(n, mode) for n, source in data.sources.items() for mode in source.modes if mode not in known]:
        key = f"data.sources.{name}.mode"
        where = f"{key}_probabilities.{mode}=0" if data.sources[name].mode == "joint" else f"{key}={known[0]}"
        what = f"{target.__name__} has no mode '{mode}', it knows {', '.join(known)}"
        raise UserError(what, where=key, remedy=f"set {where}, or choose a model that has it (docs/models.md)")


def not_read(key: str, policy: type) -> UserError:
    """The error of first weights that nothing reads."""
    unset = "unset VLM_SAFETENSORS_PATH, or " if key == "vlm_path" else ""
    return UserError(
        f"{policy.__name__} reads no model.{key} with these settings",
        where=f"model.{key}",
        remedy=f"{unset}set model.{key}=null, or choose a model that has such a part (docs/models.md)",
    )
