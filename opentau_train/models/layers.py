"""The parts of a transformer policy: pre-norm blocks without biases, an image stem, embeddings of time and place.

Shape suffixes: B samples, N tokens, K keys (past and new tokens), D width, n heads, d head width.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opentau_train.errors import UserError
from opentau_train.models.packing.attention import Mask, attend

_TEMPERATURE = 10_000

KeysValues = tuple[Tensor, Tensor]
"""One block's keys and values, each `[B, n, K, d]`."""


class RMSNorm(nn.RMSNorm):
    """Torch's RMSNorm with the weight in the input's dtype: under autocast a float32 weight would miss the fused
    kernel."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys (they keep lr 1e-3 stable without a tuned warm-up)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = RMSNorm(width // heads)
        self.norm_k = RMSNorm(width // heads)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BND: Tensor, mask: Mask, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        v = v.contiguous()  # it leaves the block, and FSDP warns of outputs that are views
        # Autocast may run the norms in float32, and SDPA wants one dtype.
        q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y_BnNd = attend(q, k, v, mask)
        return self.out(y_BnNd.transpose(1, 2).flatten(2)), (k, v)


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020), with as many weights as a plain MLP whose hidden layer is `ratio` times as wide."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        hidden = 32 * math.ceil(2 * ratio * width / 3 / 32)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm_attention = RMSNorm(width)
        self.attention = Attention(width, heads)
        self.norm_mlp = RMSNorm(width)
        self.mlp = Mlp(width, mlp_ratio)

    def forward(self, x: Tensor, mask: Mask, past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """`x` [B, N, D] -> the same, and the keys and values it used. `mask` bool, broadcast to [B, n, N, K]: True
        where the query may see the key, or packed; `past` are keys and values that stand before those of `x`."""
        y, keys_values = self.attention(self.norm_attention(x), mask, past)
        x = x + y
        return x + self.mlp(self.norm_mlp(x)), keys_values


def check_patch_size(key: str, size: int) -> None:
    """Raises `UserError` for a side of patches, the setting `model.KEY`, that no halvings of a picture lead to."""
    if size < 2 or size & (size - 1):
        raise UserError(f"model.{key}={size} must be a power of 2", remedy=f"set model.{key}=16")


def check_sizes(width: int, heads: int, patch_size: int, stem_channels: int) -> None:
    """Raises `UserError` for the sizes of a model that its `Block`s and its `ImageStem` can't have."""
    if width % heads or width % 8:
        raise UserError(
            f"model.width={width} must be a multiple of 8 and of model.heads={heads}", remedy="change one of them"
        )
    check_patch_size("patch_size", patch_size)
    if stem_channels % 8:
        raise UserError(f"model.stem_channels={stem_channels} must be a multiple of 8", remedy="set it to 32")


class ImageStem(nn.Module):
    """Frames to a grid of tokens: stride-2 convolutions, one for each halving, then a projection.

    Overlapping convolutions find where a small object is within tens of steps; linear patches need far longer.
    `colours` are a frame's channels.
    """

    def __init__(self, image_size: tuple[int, int], halvings: int, channels: int, width: int, colours: int = 3):
        super().__init__()
        sizes = [colours] + [channels * 2 ** min(i, 2) for i in range(halvings)]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False) for a, b in itertools.pairwise(sizes)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, size, eps=1e-5) for size in sizes[1:])
        self.project = nn.Linear(sizes[-1], width, bias=False)
        self.grid = tuple(math.ceil(side / 2**halvings) for side in image_size)

    def forward(self, frames: Tensor) -> Tensor:
        """`frames` [M, 3, H, W] uint8 -> [M, P, D], P grid places row by row."""
        return self.of_values(frames.float() / 127.5 - 1.0)

    def of_values(self, x: Tensor) -> Tensor:
        """The same of values [M, `colours`, H, W] f32, of a size near 1."""
        x = x.contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        return self.project(x.flatten(2).transpose(1, 2))


def time_features(time: Tensor, width: int) -> Tensor:
    """`time` [B] f32 in [0, 1] -> [B, width] f32 sines and cosines, periods 4e-3 to 4 as in pi0."""
    fraction = torch.linspace(0.0, 1.0, width // 2, device=time.device)
    angle = 2.0 * math.pi * time[:, None] / (4e-3 * 1e3**fraction)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def sinusoids(num: int, width: int) -> Tensor:
    """[num, width] f32: sines and cosines of the place, interleaved (Vaswani et al. 2017)."""
    return _interleaved(torch.arange(num, dtype=torch.float64), width).float()


def sinusoids_2d(height: int, width: int, channels: int) -> Tensor:
    """[height * width, channels] f32, the places row by row: the first half of the channels tells the row, the second
    the column, each counted from 1 and scaled to (0, 2 pi] (Carion et al. 2020)."""
    rows, columns = (2 * math.pi * torch.arange(1, n + 1, dtype=torch.float64) / (n + 1e-6) for n in (height, width))
    row, column = _interleaved(rows, channels // 2), _interleaved(columns, channels // 2)
    both = [row[:, None].expand(-1, width, -1), column[None].expand(height, -1, -1)]
    return torch.cat(both, dim=-1).flatten(0, 1).float()


def _interleaved(place: Tensor, width: int) -> Tensor:
    angle = place[:, None] / _TEMPERATURE ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def init_weights(module: nn.Module, depth: int) -> None:
    """Normal(0, 0.02) matrices and embeddings, residual outputs scaled by 1/sqrt(2 depth) as in GPT-2, He-normal
    convolutions. Draws from torch's global generator, which the caller seeds."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        elif parameter.ndim >= 2 or name.endswith("embed"):
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if residual else 0.02)
