"""The parts of pi0's and pi0.5's network that are not transformers' own."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

_ROPE_THETA = 10_000.0
MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0
"""Of the flow time's sines and cosines."""
Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the tokens' places, each [B, N, d] f32."""


class AdaptiveNorm(nn.Module):
    """RMSNorm whose scale, shift and gate are a linear function of a condition (pi0.5's "adaRMS")."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [B, N, D] and `condition` [B, D] -> (normed x, the gate [B, 1, D] of what is made of it)."""
        scale, shift, gate = self.dense(condition)[:, None].chunk(3, dim=-1)
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return (normed * (1.0 + scale.float()) + shift.float()).type_as(x), gate.to(x.dtype)


class Tokens(NamedTuple):
    """Tokens `x` [B, N, D] with the rotation of their places; `mask` [B, 1, N, K] bool, True where a token may look at
    a key; `condition` [B, D] of adaptive norms."""

    x: Tensor
    rope: Rope
    mask: Tensor
    condition: Tensor | None = None


def normed(norm: nn.Module, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`x` behind a norm of either kind, and the gate of an adaptive one."""
    return (norm(x), None) if condition is None else norm(x, condition)


def rotations(places: Tensor, head_dim: int) -> Rope:
    """Of tokens at `places` [B, N] int64 (Su et al. 2021)."""
    powers = torch.arange(0, head_dim, 2, dtype=torch.float32, device=places.device) / head_dim
    angles = places[..., None].float() * (1.0 / _ROPE_THETA**powers)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def context_mask(valid: Tensor, num: int) -> Tensor:
    """[B, 1, N, N] bool for tokens of which `valid` [B, N] exist: all see the first `num`, those behind them also the
    earlier ones of their own."""
    place = torch.arange(valid.shape[1], device=valid.device)
    causal = (place[None] < num) | (place[None] <= place[:, None])
    return (causal & valid[:, None])[:, None]


def expert_mask(valid: Tensor, num: int, before: int) -> Tensor:
    """[B, 1, N, K] bool for the N tokens of K behind a prefix of `num`, `valid` [B, K] of which exist: the first
    `before` don't see the others, which see everything."""
    place = torch.arange(valid.shape[1], device=valid.device) - num
    allowed = (place[None] < before) | (place[num:, None] >= before)
    return (allowed & valid[:, None])[:, None]


def present_only(tower: nn.Module, frames: Tensor, present: Tensor) -> Tensor:
    """What `tower` makes of `frames` [M, 3, H, W]: [M, P, D], 0 of those that aren't `present` [M] bool, for which
    nothing is computed but where there is no other."""
    (places,) = present.nonzero(as_tuple=True)
    places = places if len(places) else torch.zeros_like(present[:1], dtype=torch.int64)
    made = tower(frames[places])
    blank = torch.zeros(len(frames), *made.shape[1:], dtype=made.dtype, device=made.device)
    return blank.index_copy(0, places, made)


def time_features(time: Tensor, width: int) -> Tensor:
    """`time` [B] f32 -> [B, width] f32 sines and cosines, rounded as transformers' pi0 rounds them."""
    fraction = torch.linspace(0.0, 1.0, width // 2, device=time.device)
    frequency = 1.0 / (MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction) * 2 * math.pi
    angle = frequency[None] * time[:, None]
    return torch.cat([angle.sin(), angle.cos()], dim=1)
