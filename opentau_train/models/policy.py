"""What a policy must offer to be trained: per-sample sums and counts of its loss terms, never a mean.

The loop divides once, by the counts of the whole global batch, so any split into micro-batches and ranks trains the
same. A policy knows nothing of datasets: the validation takes its per-sample terms apart by group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import nn

from opentau_train.data.batch import Batch
from opentau_train.data.transforms.base import Wants
from opentau_train.models.draws import Draws
from opentau_train.types import LossTerms


class Policy(nn.Module, ABC):
    """Built as `Class(spec, width=..., ...)`: what the mixture yields (`BatchSpec`), then typed
    keyword arguments that its YAML in conf/model/ sets (`typed.instantiate(tree, "model", spec=spec)`).

    Every parameter takes part in every forward pass: DDP runs without `find_unused_parameters`.
    """

    loss_weights: dict[str, float]
    """{term: its weight in the total loss}, one entry for each term that `forward` returns."""

    meta_init: ClassVar[bool] = False
    """True: the constructor may run on torch's meta device, and `init_weights` sets what no `reset_parameters` of the
    modules inside sets. The policy is then sharded before it has memory. False: each process builds the whole on its
    CPU and moves it to the device block by block."""

    adapters: tuple[str, ...] = ()
    """The names of its layers that LoRA adapters wrap (`models.finetune`)."""

    def init_weights(self) -> None:
        """Set the parameters and buffers anew, in place, by draws from torch's global generator (`meta_init`)."""

    def wants(self) -> Wants:
        """What the policy needs of the data: transforms that make its own fields (tokens, masks), modes, a size of
        pictures.

        `forward` gets tensors only: text is turned into them in the loader's workers, by these transforms.
        """
        return Wants()

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

    @abstractmethod
    def sample_actions(self, batch: Batch, draws: Draws) -> torch.Tensor:
        """The predicted chunk `[B, T, A]` f32, normalised.

        Reads only what a robot has (images, prompt, state, masks of dims and cameras), never the batch's actions.
        """

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated layers, in order: the units that are sharded or compiled one by one."""
