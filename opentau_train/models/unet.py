"""The conditional 1-D U-Net of Diffusion Policy (Chi et al. 2023): convolutions over the steps of an action chunk, each
modulated (FiLM, Perez et al. 2018) by the diffusion step and the observation. Parameters have LeRobot's names.

Shapes: B samples, C channels, T steps of the chunk, A action dims, D dims of the condition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from opentau_train.config.bounds import positive
from opentau_train.errors import UserError

_FINAL_GROUPS = 8  # the last block's, whatever the others' are, as published


@dataclass(frozen=True)
class UnetSizes:
    """`down_dims`: channels of each level, between which the steps are halved; `kernel_size` of the convolutions over
    steps, `groups` of their norms; `step_dim` of the diffusion step's embedding; `film_scale`: the condition scales
    channels too, not only shifts them."""

    down_dims: tuple[int, ...]
    kernel_size: int
    groups: int
    step_dim: int
    film_scale: bool

    @property
    def multiple(self) -> int:
        """What the steps of a chunk must be a multiple of."""
        return 2 ** len(self.down_dims)

    def check(self, path: str) -> None:
        """Raises `UserError` for sizes that no U-Net has."""
        for name in ("kernel_size", "groups", "step_dim"):
            positive(f"{path}.{name}", getattr(self, name))
        groups = math.lcm(self.groups, _FINAL_GROUPS)
        if not self.down_dims or any(dim < 1 or dim % groups for dim in self.down_dims):
            raise UserError(
                f"{path}.down_dims={list(self.down_dims)} must be multiples of {groups}, and one at least",
                remedy=f"set {path}.down_dims=[{16 * groups},{32 * groups}]",
            )
        if self.step_dim % 2 or self.step_dim < 4 or not self.kernel_size % 2:
            raise UserError(
                f"{path}.step_dim={self.step_dim} must be even and above 2, {path}.kernel_size={self.kernel_size} odd",
                remedy=f"set {path}.step_dim=128 and {path}.kernel_size=5",
            )


class Unet(nn.Module):
    """Noised chunks -> what the policy predicts of them."""

    def __init__(self, action_dim: int, condition_dim: int, sizes: UnetSizes):
        super().__init__()
        width, dims = sizes.step_dim, sizes.down_dims
        self.diffusion_step_encoder = nn.Sequential(
            StepFeatures(width), nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
        )
        block = partial(FilmBlock, condition_dim=width + condition_dim, sizes=sizes)
        ends: list[nn.Module] = [*(nn.Conv1d(dim, dim, 3, 2, 1) for dim in dims[:-1]), nn.Identity()]
        self.down_modules = nn.ModuleList(
            nn.ModuleList([block(into, out), block(out, out), end])
            for (into, out), end in zip(pairwise((action_dim, *dims)), ends, strict=True)
        )
        self.mid_modules = nn.ModuleList([block(dims[-1], dims[-1]) for _ in range(2)])
        self.up_modules = nn.ModuleList(
            nn.ModuleList([block(2 * into, out), block(out, out), nn.ConvTranspose1d(out, out, 4, 2, 1)])
            for into, out in pairwise(reversed(dims))
        )
        self.final_conv = nn.Sequential(
            ConvBlock(dims[0], dims[0], sizes.kernel_size, _FINAL_GROUPS), nn.Conv1d(dims[0], action_dim, 1)
        )

    def blocks(self) -> list[nn.Module]:
        """The modulated blocks, in order."""
        return [module for module in self.modules() if isinstance(module, FilmBlock)]

    def forward(self, chunk: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        """`chunk` [B, T, A] f32, diffusion steps `step` [B] i64, `condition` [B, D] f32 -> [B, T, A]."""
        given = torch.cat([self.diffusion_step_encoder(step), condition], dim=-1)
        x, skipped = chunk.transpose(1, 2), list[Tensor]()
        for first, second, end in map(_triple, self.down_modules):
            x = second(first(x, given), given)
            skipped.append(x)
            x = end(x)
        for middle in self.mid_modules:
            x = middle(x, given)
        for first, second, end in map(_triple, self.up_modules):
            x = torch.cat([x, skipped.pop()], dim=1)
            x = end(second(first(x, given), given))
        return self.final_conv(x).transpose(1, 2)


def _triple(level: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    first, second, end = cast(nn.ModuleList, level)
    return first, second, end


class StepFeatures(nn.Module):
    """Sines, then cosines, of the diffusion step [B] -> [B, `width`] f32 (Vaswani et al. 2017)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, step: Tensor) -> Tensor:
        half = self.width // 2
        frequency = torch.exp(torch.arange(half, device=step.device) * -(math.log(10_000) / (half - 1)))
        angle = step[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class ConvBlock(nn.Module):
    """A convolution over steps, a norm of `groups` groups of channels, Mish."""

    def __init__(self, into: int, out: int, kernel_size: int, groups: int):
        super().__init__()
        convolution = nn.Conv1d(into, out, kernel_size, padding=kernel_size // 2)
        self.block = nn.Sequential(convolution, nn.GroupNorm(groups, out), nn.Mish())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class FilmBlock(nn.Module):
    """Two convolutions beside a shortcut; the condition scales and shifts the channels between them."""

    def __init__(self, into: int, out: int, condition_dim: int, sizes: UnetSizes):
        super().__init__()
        self.conv1 = ConvBlock(into, out, sizes.kernel_size, sizes.groups)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(condition_dim, out * (1 + sizes.film_scale)))
        self.conv2 = ConvBlock(out, out, sizes.kernel_size, sizes.groups)
        self.residual_conv = nn.Identity() if into == out else nn.Conv1d(into, out, 1)
        self.film_scale = sizes.film_scale

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`x` [B, C, T], `condition` [B, D] -> [B, C', T]."""
        film = self.cond_encoder(condition)[..., None]
        y = self.conv1(x)
        if self.film_scale:
            scale, film = film.chunk(2, dim=1)
            y = scale * y
        return self.conv2(y + film) + self.residual_conv(x)
