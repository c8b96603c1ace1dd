"""Transforms that leave inputs out: at random, so that a policy copes without them, or all pictures, to see what they
are worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from opentau_train.data.transforms.base import Record, SampleDraws, Transform


@dataclass(frozen=True)
class DropInputs(Transform):
    """Drops the prompt, the whole state, and each camera, with these probabilities, in training."""

    prompt: float = 0.0
    state: float = 0.0
    camera: float = 0.0

    reads: ClassVar = ("prompt", "state", "state_dim_mask", "images")
    writes: ClassVar = ("prompt", "state", "state_dim_mask", "images")
    training_only: ClassVar = True

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        if self.prompt and draws.uniform("prompt") < self.prompt:
            record["prompt"] = ""
        if self.state and draws.uniform("state") < self.state:
            for name in ("state", "state_dim_mask"):
                record[name] = np.zeros_like(record[name])
        if self.camera:
            images = record["images"].items()
            record["images"] = {c: v for c, v in images if draws.uniform("camera", c) >= self.camera}
        return record


@dataclass(frozen=True)
class BlankImages(Transform):
    """Makes every picture black."""

    reads: ClassVar = ("images",)
    writes: ClassVar = ("images",)

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        record["images"] = {camera: np.zeros_like(image) for camera, image in record["images"].items()}
        return record
