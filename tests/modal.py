"""A policy that knows every mode, named by `_target_`: the built-in one, and it guesses the colour of the future."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from opentau_train.config.modes import MODES
from opentau_train.models.flow import FlowPolicy
from opentau_train.models.inputs import real_state

MODAL = ["model._target_=tests.modal.ModalPolicy", "data.future.num_frames=2"]
"""It, and future frames for it."""


class ModalPolicy(FlowPolicy):
    """`vision_mse`: the mean colour of each future frame of each camera, from the state alone."""

    modes = MODES

    def __init__(self, spec, **options: Any):
        super().__init__(spec, **options)
        self.loss_weights["vision_mse"] = 1.0
        self.colour_out = nn.Linear(max(1, spec.state_dim), 3)

    def _supervised(self, batch):
        return {term: mask for term, mask in super()._supervised(batch).items() if term != "vision_mse"}

    def _seen(self, batch):
        """{camera: [B, F, 1] bool}: the future frames to guess."""
        real = ~batch.future_is_pad & batch.supervised[:, 2, None] & (batch.weight != 0)[:, None]
        return {camera: (real & present[:, None])[..., None] for camera, present in batch.future_mask.items()}

    def term_counts(self, batch):
        seen = sum(mask.sum((1, 2), dtype=torch.float32) for mask in self._seen(batch).values())
        return {**super().term_counts(batch), "vision_mse": 3 * seen}

    def forward(self, batch, draws):
        guess, total = self.colour_out(real_state(batch))[:, None], 0.0
        for camera, mask in self._seen(batch).items():
            error = (guess - batch.future[camera].float().mean((3, 4)) / 255).square()
            total = total + torch.where(mask, error, 0.0).sum((1, 2))
        return {**super().forward(batch, draws), "vision_mse": (total, self.term_counts(batch)["vision_mse"])}
