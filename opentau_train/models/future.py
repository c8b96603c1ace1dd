"""The future frames of a batch: as values that are noised and predicted, and as tokens of a transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from opentau_train.config.modes import MODES
from opentau_train.data.batch import Batch
from opentau_train.data.fields import Field
from opentau_train.data.transforms.base import Record, SampleDraws, Transform
from opentau_train.models.encoders import VisionEncoder
from opentau_train.models.layers import ImageStem, RMSNorm
from opentau_train.models.packing.attention import present_only
from opentau_train.types import BatchSpec


@dataclass(frozen=True)
class EncodeMode(Transform):
    """`mode_code` int64: the place in `MODES` of the sample's mode, on a robot of the mode `robot`."""

    robot: str

    reads: ClassVar = ("mode",)
    writes: ClassVar = ("mode_code",)

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        record["mode_code"] = MODES.index(record.get("mode", self.robot))
        return record

    def longest(self, record: Record) -> Record:
        return {**record, "mode_code": MODES.index(record["mode"])}

    def fields(self, spec: BatchSpec) -> tuple[Field, ...]:
        return (Field("mode_code", (), np.int64),)


class Future(nn.Module):
    """Future frames as values [B, C, F, P, V] f32, and these as tokens [B, C F P, D] and back: P places of a frame row
    by row, V values each. `patch_size` (a power of 2) None: the values are an encoder's; `channels`: see `ImageStem`,
    which makes tokens of pixels."""

    def __init__(self, spec: BatchSpec, width: int, patch_size: int | None, channels: int):
        super().__init__()
        self.cameras, self.patch_size = spec.future_cameras, patch_size
        if patch_size is None:
            self.encoder = VisionEncoder(spec.image_size, width, frozen=True)
            self.values, self.grid = self.encoder.project.in_features, self.encoder.grid
            del self.encoder.project  # its features are noised before they become tokens
            self.project = nn.Linear(2 * self.values, width, bias=False)
        else:
            self.values = 3 * patch_size**2
            self.stem = ImageStem(spec.image_size, patch_size.bit_length() - 1, channels, width, colours=6)
            self.grid = self.stem.grid
        self.places = self.grid[0] * self.grid[1]
        self.camera_embed = nn.Parameter(torch.empty(len(self.cameras), 1, 1, width))
        self.frame_embed = nn.Parameter(torch.empty(spec.future, 1, width))
        self.place_embed = nn.Parameter(torch.empty(self.places, width))
        self.norm = RMSNorm(width)
        self.out = nn.Linear(width, self.values, bias=False)

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The present frame [B, C, 1, P, V] and the future ones."""
        present = [batch.images[camera][:, -1:] for camera in self.cameras]
        both = torch.cat([torch.stack(present, 1), torch.stack([batch.future[c] for c in self.cameras], 1)], dim=2)
        values = self.encode(both.flatten(0, 2)).unflatten(0, both.shape[:3])
        return values[:, :, :1], values[:, :, 1:]

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """`frames` [M, 3, H, W] uint8 RGB -> [M, P, V]: pixels from -1 to 1, or features of mean 0 and deviation 1."""
        if self.patch_size is None:
            features = self.encoder.encode(frames).float()
            return nn.functional.layer_norm(features, features.shape[-1:])
        size = self.patch_size
        patches = frames.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        return patches.flatten(3).flatten(1, 2).float() / 127.5 - 1.0

    def shown(self, values: Tensor) -> Tensor:
        """Values as `WamPolicy.future_form` has them."""
        return values if self.patch_size is None else (self._pixels(values) / 2 + 0.5).clamp(0.0, 1.0)

    def _pixels(self, values: Tensor) -> Tensor:
        """Values of pixels [..., P, V] as pictures [..., 3, H, W]."""
        assert self.patch_size is not None, "an encoder's aren't pixels"
        patches = values.unflatten(-1, (3, self.patch_size, self.patch_size)).unflatten(-4, self.grid)
        rows = patches.movedim(-3, -5).movedim(-2, -3)  # [..., 3, h, size, w, size]
        return rows.flatten(-2).flatten(-3, -2)

    def tokens(self, values: Tensor, present: Tensor, there: Tensor, num: int | None = None) -> Tensor:
        """Each frame's values beside those of the `present` frame in the same place. Where the host knows how many
        (`num`) of the frames are `there` [B, C, F] bool, convolutions leave out the others."""
        present = present.expand_as(values)
        if self.patch_size is None:
            made = self.project(torch.cat([values, present], dim=-1))
        else:
            both = torch.cat([self._pixels(values), self._pixels(present)], dim=-3)
            if num is None:
                made = self.stem.of_values(both.flatten(0, 2))
            else:
                made = present_only(self.stem.of_values, both.flatten(0, 2), there.flatten(), num)
            made = made.unflatten(0, both.shape[:3])
        return (made + self.camera_embed + self.frame_embed + self.place_embed).flatten(1, 3)

    def of_tokens(self, frames: Tensor) -> Tensor:
        """What is of the frames [B, C, F], of their tokens."""
        return frames[..., None].expand(-1, -1, -1, self.places).flatten(1)

    def clean(self, tokens: Tensor, present: Tensor) -> Tensor:
        """The clean values that tokens predict: what becomes of those of the `present` frame."""
        change = self.out(self.norm(tokens)).float()
        return present + change.unflatten(1, (len(self.cameras), -1, self.places))


def exist(batch: Batch) -> Tensor:
    """[B, C, F] bool: the future frames that a sample has."""
    return torch.stack(list(batch.future_mask.values()), dim=1)[..., None] & ~batch.future_is_pad[:, None]
