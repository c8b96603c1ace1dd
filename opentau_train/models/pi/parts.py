"""The parts of pi0's and pi0.5's network that are not transformers' own."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opentau_train.models.packing.attention import Mask, PackedAttention, Packing

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

    def forward(self, x: Tensor, condition: Tensor, samples: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`x` [B, N, D] and `condition` [B, D] -> (normed x, the gate [B, 1, D] of what is made of it); of packed `x`
        [1, N, D] and the `samples` [N] int64 that its tokens belong to, the gate [1, N, D]."""
        made = self.dense(condition)
        scale, shift, gate = (made[:, None] if samples is None else made[samples][None]).chunk(3, dim=-1)
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return (normed * (1.0 + scale.float()) + shift.float()).type_as(x), gate.to(x.dtype)


class Tokens(NamedTuple):
    """Tokens `x` [B, N, D] with the rotation of their places; `mask` [B, 1, N, K] bool, True where a token may look at
    a key; `condition` [B, D] of adaptive norms. Or packed: `x` [1, N, D], its `mask` an attention, and of each token
    which of the `samples` [N] int64 it belongs to."""

    x: Tensor
    rope: Rope
    mask: Mask
    condition: Tensor | None = None
    samples: Tensor | None = None


def normed(norm: nn.Module, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
    """Their `x` behind a norm of either kind, and the gate of an adaptive one."""
    if tokens.condition is None:
        return norm(tokens.x), None
    return norm(tokens.x, tokens.condition, tokens.samples)


def rotations(places: Tensor, head_dim: int) -> Rope:
    """Of tokens at `places` [B, N] int64 (Su et al. 2021)."""
    powers = torch.arange(0, head_dim, 2, dtype=torch.float32, device=places.device) / head_dim
    angles = places[..., None].float() * (1.0 / _ROPE_THETA**powers)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def context(x: Tensor, valid: Tensor, num: int, head_dim: int) -> Tokens:
    """Tokens `x` [B, N, D] of which `valid` [B, N] exist: all see the first `num`, those behind them also the earlier
    ones of their own."""
    place = torch.arange(valid.shape[1], device=valid.device)
    causal = (place[None] < num) | (place[None] <= place[:, None])
    return Tokens(x, rotations(valid.long().cumsum(1) - 1, head_dim), (causal & valid[:, None])[:, None])


def behind(x: Tensor, condition: Tensor | None, valid: Tensor, exist: Tensor, head_dim: int) -> Tokens:
    """Tokens `x` [B, N, D] behind a prefix of which `valid` [B, P] exist, with their `condition`. The last of them,
    those of a chunk of which `exist` [B, T], see everything, those before them don't see the chunk."""
    num, before = valid.shape[1], x.shape[1] - exist.shape[1]
    keys = torch.cat([valid, torch.ones_like(exist[:, :1]).expand(-1, before), exist], dim=1)
    place = torch.arange(keys.shape[1], device=keys.device) - num
    allowed = (place[None] < before) | (place[num:, None] >= before)
    rope = rotations((keys.long().cumsum(1) - 1)[:, num:], head_dim)
    return Tokens(x, rope, (allowed & keys[:, None])[:, None], condition)


def packed(prefix: Tokens, suffix: Tokens, packing: Packing) -> tuple[Tokens, Tokens, int]:
    """Both without padding, and how many tokens of the prefix the suffix sees. The parts of `packing`: what all of
    `prefix` see, what stands behind it, and the suffix' tokens before the chunk and in it."""

    def pack(tokens: Tokens, parts: tuple[int, int], attention: PackedAttention) -> Tokens:
        first = packing.slots[parts[0]]

        def one(x: Tensor) -> Tensor:
            return packing.pack({parts[0]: x[:, :first], parts[1]: x[:, first:]})

        cos, sin = tokens.rope
        return Tokens(one(tokens.x), (one(cos), one(sin)), attention, tokens.condition, packing.samples(*parts))

    seen_by_prefix = packing.attention({0: (0,), 1: (0, 1)}, causal=(1,))
    seen_by_suffix = packing.attention({2: (0, 2), 3: (0, 2, 3)})
    return pack(prefix, (0, 1), seen_by_prefix), pack(suffix, (2, 3), seen_by_suffix), packing.num(0)


def time_features(time: Tensor, width: int) -> Tensor:
    """`time` [B] f32 -> [B, width] f32 sines and cosines, rounded as transformers' pi0 rounds them."""
    fraction = torch.linspace(0.0, 1.0, width // 2, device=time.device)
    frequency = 1.0 / (MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction) * 2 * math.pi
    angle = frequency[None] * time[:, None]
    return torch.cat([angle.sin(), angle.cos()], dim=1)
