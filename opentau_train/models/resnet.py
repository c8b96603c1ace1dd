"""ResNet-18 (He et al. 2015) up to its last feature map. Parameters have torchvision's names: its weights fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 32
"""Pixels a side of one place of the feature map."""
CHANNELS = 512
"""Of the feature map."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pictures in [0, 1], by colour: what published weights expect."""

Norm = Callable[[int], nn.Module]


class FrozenBatchNorm(nn.Module):
    """Batch normalisation with fixed statistics and scale: four buffers, which come with pretrained weights. Without
    them it changes nothing."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for buffer, value in ((self.weight, 1.0), (self.bias, 0.0), (self.running_mean, 0.0), (self.running_var, 1.0)):
            buffer.fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)


NORMS: dict[str, Norm] = {"frozen_batch": FrozenBatchNorm, "group": partial(nn.GroupNorm, 32)}
"""{name: layer of so many channels}. Neither mixes samples. `group` is for training from scratch."""


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, into: int, out: int, stride: int, norm: Norm):
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, padding=1, bias=False)
        self.bn1 = norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = norm(out)
        self.downsample = (
            None
            if (into, stride) == (out, 1)
            else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), norm(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """Frames [M, 3, H, W] uint8 RGB -> features [M, 512, ceil(H / 32), ceil(W / 32)] f32."""

    mean: Tensor
    std: Tensor

    def __init__(self, norm: Norm):
        super().__init__()
        for name, values in (("mean", MEAN), ("std", STD)):  # buffers: to send them with every batch stops the device
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = norm(64)
        self.layer1 = nn.Sequential(Residual(64, 64, 1, norm), Residual(64, 64, 1, norm))
        self.layer2 = nn.Sequential(Residual(64, 128, 2, norm), Residual(128, 128, 1, norm))
        self.layer3 = nn.Sequential(Residual(128, 256, 2, norm), Residual(256, 256, 1, norm))
        self.layer4 = nn.Sequential(Residual(256, 512, 2, norm), Residual(512, 512, 1, norm))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, frames: Tensor) -> Tensor:
        x = ((frames.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))
